"""SIGTERM seen at once, even while the main thread waits inside a collective.

Python runs signal handlers between two bytecodes of the main thread, so a handler alone would wait as long as the
collective does. The interpreter's C part writes the signal's number to a descriptor right away; a thread reads it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_log = logging.getLogger(__name__)


class TerminationWatch:
    """Calls `on_sigterm` once, on a thread of its own, when the first SIGTERM comes. Use on the main thread.

    Forked children get the former handler back: their SIGTERM is theirs.
    """

    def __init__(self, on_sigterm: Callable[[], None]) -> None:
        self._on_sigterm = on_sigterm
        self._pid = os.getpid()
        self._active = False
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)

    def start(self) -> bool:
        """Begin; False, with a warning, where signals cannot be watched (outside the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            _log.warning("not on the main thread: SIGTERM will not be turned into a drain")
            return False
        self._former_handler = signal.signal(signal.SIGTERM, _ignore)
        self._former_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._active = True
        os.register_at_fork(after_in_child=self._restore)
        threading.Thread(target=self._watch, name="stretto-sigterm", daemon=True).start()
        return True

    def stop(self) -> None:
        """Give SIGTERM back to who had it before. On the main thread."""
        if self._active and os.getpid() == self._pid:
            self._restore()
            os.write(self._writing, b"\0")

    def _restore(self) -> None:
        if self._active:
            self._active = False
            signal.set_wakeup_fd(self._former_fd)
            signal.signal(signal.SIGTERM, self._former_handler or signal.SIG_DFL)

    def _watch(self) -> None:
        while True:
            numbers = os.read(self._reading, 64)
            if self._former_fd >= 0 and self._active:
                os.write(self._former_fd, numbers)
            if signal.SIGTERM in numbers:
                self._on_sigterm()
                return
            if 0 in numbers:
                return


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python's own handler: the thread has seen the signal already."""
