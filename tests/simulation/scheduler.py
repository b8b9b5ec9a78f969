"""The fake clock, and what is still to happen on it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Scheduler:
    """Runs calls in the order of their times. Nothing else in the simulation knows of time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        # Set to end `run` after the present call.
        self.stopped = False
        self._calls: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        """Call it in `delay_s` seconds. It cannot be taken back: what is called looks whether it is still wanted."""
        self._count += 1
        heapq.heappush(self._calls, (self.now_s + delay_s, self._count, call, args))

    def run(self, until_s: float) -> None:
        """Let time pass until then, or until `stopped`."""
        calls = self._calls
        while calls and not self.stopped and calls[0][0] <= until_s:
            self.now_s, _, call, args = heapq.heappop(calls)
            call(*args)
        if not self.stopped:
            self.now_s = until_s
