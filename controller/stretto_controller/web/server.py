"""uvicorn on the controller's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from stretto_controller.auth.certificates import Certificates
from stretto_controller.settings import Settings

_BACKLOG = 1024


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the controller, which stops gRPC as well."""
        yield


class HttpServer:
    """The application on its port."""

    def __init__(self, app: FastAPI, settings: Settings, certificates: Certificates | None) -> None:
        self._settings = settings
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            backlog=_BACKLOG,
            # Whole seconds only; event streams do not end by themselves.
            timeout_graceful_shutdown=max(1, round(settings.service.stop_grace_s)),
        )
        config.load()
        if certificates is not None:
            config.ssl = certificates.http_context()
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Serve, and return the port. Raises OSError when the address cannot be used."""
        listener = _listen(self._settings.host, self._settings.http_port)
        port: int = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise OSError(f"the HTTP server on port {port} ended at its start")
            await asyncio.sleep(0.005)
        return port

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; asyncio makes it listen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot serve HTTP on {host}:{port}: {error}") from error
    try:
        # A controller that is started again finds its old connections in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot serve HTTP on {host}:{port}: {error.strerror}; end what uses it or give another --http-port"
        ) from error
    return listener
