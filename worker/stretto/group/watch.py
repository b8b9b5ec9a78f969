"""What one process knows of its peers in one generation, from their beacons."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping

from stretto.group.socket_thread import SocketThread
from stretto.group.standing import Standing, unpack

_ASK = b"?"


class Watch:
    """Connections to every peer's beacon, and what came of them. Call `close` in the end; what is known stays.

    Any thread reads. Facts are written by the socket thread, under a lock that is held for dictionary work only.
    """

    def __init__(
        self, thread: SocketThread, identity: bytes, generation: int, ends: Mapping[int, tuple[str, int]]
    ) -> None:
        self._thread = thread
        self._identity = identity
        self._generation = generation
        self._changed = threading.Condition()
        self._numbers: dict[int, int] = {}
        self._entries: dict[str, bytes] = {}
        self._answers: dict[int, int] = dict.fromkeys(ends, 0)
        self._gone: dict[int, str] = {}
        self._unconnected = set(ends)
        self._links: dict[int, _Link] = {}  # touched by the socket thread only
        self._on_death: Callable[[str], None] | None = None
        thread.submit(lambda: self._open(ends))

    def numbers(self) -> dict[int, int]:
        """The latest standing's number of each rank that has told one."""
        with self._changed:
            return dict(self._numbers)

    def published(self, key: str) -> bytes | None:
        """What a peer publishes to this generation under `key`."""
        with self._changed:
            return self._entries.get(key)

    def gone(self) -> dict[int, str]:
        """Ranks whose process is not there any more, and how we know."""
        with self._changed:
            return dict(self._gone)

    def unconnected(self) -> list[int]:
        """Ranks that no connection leads to yet: a busy or frozen process has one at once, by its kernel."""
        with self._changed:
            return sorted(self._unconnected)

    def wait(self, timeout_s: float) -> None:
        """Return when something changed, or after `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def roll_call(self, limit_s: float) -> dict[int, str]:
        """Ask everybody; return who is gone or did not answer within `limit_s`, and how we know. Blocks so long."""
        deadline_s = time.monotonic() + limit_s
        with self._changed:
            before = dict(self._answers)
        self._thread.submit(self._ask)

        def silent() -> list[int]:
            return [rank for rank in before if rank not in self._gone and self._answers[rank] == before[rank]]

        with self._changed:
            while silent() and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return self._gone | dict.fromkeys(silent(), f"did not answer within {limit_s:g} s")

    def on_death(self, call: Callable[[str], None]) -> None:
        """Have this called in the socket thread when a member is gone without having left; now, for earlier ones."""
        with self._changed:
            self._on_death = call
            dead = [self._words(rank) for rank in self._gone if self._died(rank)]
        for words in dead:
            call(words)

    def close(self) -> None:
        """End our connections, and tell of no death any more. Returns at once."""
        with self._changed:
            self._on_death = None
        self._thread.submit(self._close)

    def connected(self, rank: int) -> None:
        """Called by the link to `rank`."""
        with self._changed:
            self._unconnected.discard(rank)

    def heard(self, rank: int, standing: Standing) -> None:
        """Called by the link to `rank`."""
        with self._changed:
            self._numbers[rank] = standing.number
            self._answers[rank] += 1
            if standing.number == self._generation:
                self._entries.update(standing.entries)
            self._changed.notify_all()

    def lost(self, rank: int, why: str) -> None:
        """Called by the link to `rank`."""
        link = self._links.pop(rank, None)
        if link is not None:
            link.close()
        with self._changed:
            self._gone[rank] = why
            self._changed.notify_all()
            call = self._on_death if self._died(rank) else None
        if call is not None:
            call(self._words(rank))

    def _died(self, rank: int) -> bool:
        """A member that leaves says so first, and may end after that as it likes."""
        return self._numbers.get(rank) == self._generation

    def _words(self, rank: int) -> str:
        return f"rank {rank}: {self._gone[rank]}"

    def _open(self, ends: Mapping[int, tuple[str, int]]) -> None:
        for rank, (address, port) in ends.items():
            try:
                self._links[rank] = _Link(self._thread, self._identity, self, rank, address, port)
            except OSError as error:
                self.lost(rank, f"no connection could be begun: {error.strerror}")

    def _ask(self) -> None:
        for link in list(self._links.values()):
            link.ask()

    def _close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()


class _Link:
    """Our connection to one peer's beacon. Runs in the socket thread."""

    def __init__(self, thread: SocketThread, identity: bytes, watch: Watch, rank: int, address: str, port: int) -> None:
        self._thread, self._identity, self._watch, self._rank = thread, identity, watch, rank
        self._buffer = b""
        self._connected = False
        self._sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.connect_ex((address, port))  # what went wrong shows when it becomes writable
        thread.selector.register(self._sock, selectors.EVENT_WRITE, self._on_event)

    def ask(self) -> None:
        if not self._connected:
            return
        try:
            self._sock.send(_ASK)
        except BlockingIOError:
            pass  # it reads nothing: the silence says so
        except OSError as error:
            self._watch.lost(self._rank, f"its connection ended: {error.strerror}")

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._thread.selector.unregister(self._sock)
            self._sock.close()

    def _on_event(self) -> None:
        if self._sock.fileno() < 0:
            return  # closed earlier in this round of events
        try:
            if not self._connected:
                self._finish_connecting()
                return
            received = self._sock.recv(65_536)
        except BlockingIOError:
            return
        except OSError as error:
            self._watch.lost(self._rank, f"its connection ended: {error.strerror}")
            return
        if received:
            self._read(received)
        else:
            self._watch.lost(self._rank, "its process ended")

    def _finish_connecting(self) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._connected = True
        self._watch.connected(self._rank)
        self._thread.selector.modify(self._sock, selectors.EVENT_READ, self._on_event)

    def _read(self, received: bytes) -> None:
        self._buffer += received
        while True:
            try:
                standing, self._buffer = unpack(self._buffer, self._identity)
            except ValueError:
                self._watch.lost(self._rank, "somebody else answered in its place")
                return
            if standing is None:
                return
            self._watch.heard(self._rank, standing)
