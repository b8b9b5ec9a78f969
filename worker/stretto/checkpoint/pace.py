"""How fast a save goes beside training, and whether it may go on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from stretto.checkpoint.errors import Abandoned


class Pace:
    """`share`: of one core's time, per thread that writes, until somebody waits for the save; None: all of it."""

    def __init__(self, share: float | None) -> None:
        self.leisurely = share is not None
        self._share = share or 1.0
        self._hurried = threading.Event()
        self._cancelled = threading.Event()
        if share is None:
            self._hurried.set()

    def hurry(self) -> None:
        """Somebody waits: rest no more."""
        self._hurried.set()

    def cancel(self) -> None:
        """Write nothing more."""
        self._cancelled.set()
        self._hurried.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Around one block's work, on the thread that does it: then it rests. Raises Abandoned before one."""
        if self.cancelled:
            raise Abandoned
        begun_s, begun_cpu_s = time.monotonic(), time.thread_time()
        yield
        rest_s = (time.thread_time() - begun_cpu_s) / self._share - (time.monotonic() - begun_s)
        if rest_s > 0:
            self._hurried.wait(rest_s)
