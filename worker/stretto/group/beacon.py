"""Each process's small listener: tells whoever connects which generation this process is in.

It writes the standing at once, at each change, and again for each byte it is sent. A connection lives as long as the
generation; when this process ends, the kernel ends it. So a watcher knows within a millisecond that we died, and by
asking, that we are frozen. What gloo publishes goes the same way, so that no generation depends on one member's store.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import threading
from collections.abc import Mapping

from stretto.group.socket_thread import SocketThread
from stretto.group.standing import Standing
from stretto.group.watch import Watch

_MAX_VISITORS = 65_536  # beyond every world size that a full mesh of gloo can have


class Beacon:
    """The listener and the thread of its sockets. Any thread calls it.

    `job` keeps processes of different jobs, that meet on a port by mistake, from taking each other's word.
    """

    def __init__(self, job: str, address: str) -> None:
        self._identity = hashlib.sha256(job.encode()).digest()[:16]
        self._lock = threading.Lock()  # for whoever changes the two fields below
        self._standing = Standing()
        self._message = self._standing.pack(self._identity)
        self._visitors: set[_Visitor] = set()  # touched by the thread only
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._thread = SocketThread("stretto-beacon")
        self._thread.submit(self._listen)

    def announce(self, number: int) -> None:
        """Tell everyone who watches us, and everyone who will. What was published is forgotten."""
        with self._lock:
            self._tell(Standing(number))

    def publish(self, generation: int, key: str, value: bytes) -> None:
        """Add an entry to what we tell, until the next announcement; nothing if we are not in this generation."""
        with self._lock:
            if self._standing.number == generation:  # else a thread of torch's speaks for one that was given up
                self._tell(Standing(generation, {**self._standing.entries, key: value}))

    def watch(self, generation: int, ends: Mapping[int, tuple[str, int]]) -> Watch:
        """Start watching the beacons at these addresses and ports, by rank."""
        return Watch(self._thread, self._identity, generation, ends)

    def close(self) -> None:
        """End the thread and every connection."""
        self._thread.close()

    def _listen(self) -> None:
        self._thread.selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _tell(self, standing: Standing) -> None:
        self._standing = standing
        self._message = standing.pack(self._identity)
        self._thread.submit(self._tell_all)

    def _tell_all(self) -> None:
        for visitor in list(self._visitors):
            self._tell_one(visitor)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # the visitor left, or descriptors ran out: it will see no answer
        if len(self._visitors) >= _MAX_VISITORS:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        visitor = _Visitor(sock)
        self._visitors.add(visitor)
        self._thread.selector.register(sock, selectors.EVENT_READ, lambda: self._hear(visitor))
        self._tell_one(visitor)

    def _hear(self, visitor: _Visitor) -> None:
        try:
            asked = visitor.sock.recv(64)
        except OSError:
            asked = b""
        if asked:
            self._tell_one(visitor)
        else:
            self._show_out(visitor)

    def _tell_one(self, visitor: _Visitor) -> None:
        message = self._message
        try:
            sent = visitor.sock.send(message)
        except OSError:
            sent = 0
        if sent < len(message):  # it left, or does not read what it asked for
            self._show_out(visitor)

    def _show_out(self, visitor: _Visitor) -> None:
        if visitor in self._visitors:
            self._visitors.remove(visitor)
            self._thread.selector.unregister(visitor.sock)
            visitor.sock.close()


class _Visitor:
    """A peer that watches us."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
