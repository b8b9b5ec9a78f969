"""A TCP line between two processes on this machine that can be cut without a word to either end."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType

_CHUNK_BYTES = 1 << 16


class Line:
    """Forwards what comes to `endpoint` to `target`, both HOST:PORT. While it is cut nothing passes or closes.

    What is sent meanwhile is lost, as when a cable is pulled for longer than TCP waits: `heal` closes old connections.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._forth = self._back = True
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._drop()

    def cut(self, *, answers_only: bool = False) -> None:
        """From now on nothing passes; answers_only: requests still arrive."""
        self._forth, self._back = answers_only, False

    def heal(self) -> None:
        self._drop()
        self._forth = self._back = True

    def _drop(self) -> None:
        with self._lock:
            open_now, self._open = self._open, []
        for each in open_now:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            with self._lock:
                self._open += [near, far]
            for source, sink, forth in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, sink, forth), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                if self._forth if forth else self._back:
                    sink.sendall(data)
            if self._forth if forth else self._back:
                sink.shutdown(socket.SHUT_WR)
