"""One thread that owns sockets: whoever wants something done with them hands in an action."""

from __future__ import annotations

import functools
import os
import selectors
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable


class SocketThread:
    """Waits for registered sockets, whose data is a callable that takes no argument, and runs submitted actions.

    `selector` is for code that runs in this thread. Callables and actions neither block nor raise. A forked child (of
    a DataLoader, say) gives its copies of the sockets up: it would keep them open after our death.
    """

    def __init__(self, name: str) -> None:
        self.selector = selectors.DefaultSelector()
        self._actions: deque[Callable[[], None]] = deque()  # its operations are atomic
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._closing = False
        self.selector.register(self._wake_reader, selectors.EVENT_READ, self._drain)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=functools.partial(_close_if_alive, weakref.ref(self)))

    def submit(self, action: Callable[[], None]) -> None:
        """Have the thread run this soon; from any thread, never blocks."""
        self._actions.append(action)
        try:
            self._wake_writer.send(b"!")
        except BlockingIOError:
            pass  # full of wake-ups already
        except OSError:
            self._actions.clear()  # closed: nothing is left to act on

    def close(self) -> None:
        """End the thread and close every socket that is registered."""
        self.submit(self._stop)
        self._thread.join()
        self._wake_writer.close()

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self.selector.select():
                key.data()
            while self._actions:
                self._actions.popleft()()
        self._close_all()

    def _close_all(self) -> None:
        """Close what is registered; nothing is unregistered, since after a fork the parent shares the registrations."""
        for registered in list((self.selector.get_map() or {}).values()):
            sock = registered.fileobj
            assert isinstance(sock, socket.socket)
            sock.close()
        self.selector.close()

    def _stop(self) -> None:
        self._closing = True

    def _drain(self) -> None:
        self._wake_reader.recv(4096)


def _close_if_alive(reference: weakref.ref[SocketThread]) -> None:
    """The registration lasts as long as the process, so it must not hold the object."""
    alive = reference()
    if alive is not None:
        alive._close_all()
