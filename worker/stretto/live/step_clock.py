"""What a live worker's time goes to while it trains."""

from __future__ import annotations

import threading
from collections import deque


class StepClock:
    """Who waits for whom: how long this worker has been at its own part of a step, or waiting for the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations_s: deque[float] = deque(maxlen=32)
        self._running: dict[int, float] = {}
        self._next = 0
        self._began_s: float | None = None
        self._free_s = 0.0

    def step(self, now_s: float) -> None:
        """A step begins; the one before, if there is one, has ended."""
        with self._lock:
            if self._began_s is not None:
                self._durations_s.append(now_s - self._began_s)
            self._began_s = self._free_s = now_s

    def enter(self, now_s: float) -> None:
        """A generation begins; its first step comes when its state is there."""
        with self._lock:
            self._free_s = now_s

    def quiet_s(self, now_s: float) -> float:
        """Seconds without a step or the end of an operation: also while torch itself talks to the others, unseen."""
        with self._lock:
            return now_s - self._free_s

    def stop(self) -> None:
        """No step is under way."""
        with self._lock:
            self._began_s = None
            self._running.clear()

    def begin(self, now_s: float) -> int:
        """An operation of all ranks begins."""
        with self._lock:
            self._next += 1
            self._running[self._next] = now_s
            return self._next

    def end(self, operation: int, now_s: float) -> None:
        with self._lock:
            self._running.pop(operation, None)
            self._free_s = now_s

    def read(self, now_s: float) -> tuple[float, float, float]:
        """Seconds at its own part, seconds waiting, and the median of recent steps (each 0 if there is none)."""
        with self._lock:
            if self._running:
                own_s, waiting_s = 0.0, now_s - min(self._running.values())
            else:
                own_s, waiting_s = (0.0 if self._began_s is None else now_s - self._free_s), 0.0
            ordered = sorted(self._durations_s)
        return max(own_s, 0.0), max(waiting_s, 0.0), ordered[len(ordered) // 2] if ordered else 0.0
