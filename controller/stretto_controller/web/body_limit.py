"""Request bodies above a size are refused before anything reads them whole."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Middleware: 413 for a body above `size_bytes`, whether announced or found out while it comes."""

    def __init__(self, app: ASGIApp, size_bytes: int) -> None:
        self._app = app
        self._size_bytes = size_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received_bytes = 0

        async def counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._size_bytes:
                raise HTTPException(413, f"the request's body is above {self._size_bytes} bytes, the limit here")
            return message

        await self._app(scope, counted, send)
