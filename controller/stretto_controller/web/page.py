"""The page: files beside this module, read once and served as they are."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".LICENSE": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline: a name that is markup stays a name.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A newer release's page must not meet an older one's scripts.
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and what it needs under `/static/`."""
    folder = files("stretto_controller.web") / "static"
    found = [*folder.iterdir(), *(folder / "vendor").iterdir()]
    contents = {file.name: file.read_bytes() for file in found if file.is_file()}

    def answer(name: str) -> Response:
        return Response(contents[name], headers=_HEADERS, media_type=_TYPES["." + name.rsplit(".", 1)[-1]])

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return answer("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def show_file(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        return answer(name)
