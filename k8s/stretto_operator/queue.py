"""Which jobs are to be looked at, each by one worker at a time, at once or later."""

from __future__ import annotations

import asyncio

from stretto_operator.cache import Key


class Queue:
    """Keys that wait. One that is added while a worker has it comes again when that worker is done."""

    def __init__(self) -> None:
        self._waiting: dict[Key, None] = {}
        self._held: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._some = asyncio.Event()

    def add(self, key: Key) -> None:
        if key in self._held:
            self._again.add(key)
        else:
            self._waiting[key] = None
            self._some.set()

    def add_later(self, key: Key, delay_s: float) -> None:
        """At the latest then; an earlier appointment stands."""
        loop = asyncio.get_running_loop()
        when_s = loop.time() + max(delay_s, 0.0)
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= when_s:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(when_s, self._ring, key)

    def _ring(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    async def take(self) -> Key:
        """The one that has waited longest; `done` gives it back."""
        while not self._waiting:
            self._some.clear()
            await self._some.wait()
        key = next(iter(self._waiting))
        del self._waiting[key]
        self._held.add(key)
        return key

    def done(self, key: Key) -> None:
        self._held.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    @property
    def waits(self) -> bool:
        """Some key is to be taken."""
        return bool(self._waiting)
