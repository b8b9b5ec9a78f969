"""Drops the last references to what may take long to be destroyed, in threads of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch


class Reaper:
    """One thread for each generation that ended, gone when that generation's operations are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the list of threads
        self._threads: list[threading.Thread] = []

    def take(self, remains: list[Any], unfinished: list[torch.futures.Future[Any]]) -> None:
        """Hold `remains` until the unfinished operations are over, then drop them. Returns at once.

        The caller keeps no reference: destroying a process group waits for its operations. Holding it until they are
        over means that whoever drops it last (a model wrapper that outlived us, say) does not wait either.
        """
        self._start(threading.Thread(target=_reap, args=(remains, unfinished), name="stretto-reaper", daemon=True))

    def run(self, action: Callable[[], None]) -> None:
        """Do something that may take long, such as an abort, in a thread that `wait` waits for. Returns at once."""
        self._start(threading.Thread(target=action, name="stretto-reaper", daemon=True))

    def wait(self, timeout_s: float) -> bool:
        """Whether everything taken was destroyed within `timeout_s`. Call it before the process ends."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in threads)

    def _start(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            self._threads.append(thread)
            thread.start()


def _reap(remains: list[Any], unfinished: list[torch.futures.Future[Any]]) -> None:
    while unfinished:
        with contextlib.suppress(Exception):  # how it ended was reported when the group broke
            unfinished.pop().wait()
    remains.clear()
