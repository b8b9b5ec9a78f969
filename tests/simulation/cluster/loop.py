"""asyncio on the fake clock: an event loop per simulated process, which can be frozen and killed between two calls."""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, cast

from simulation.scheduler import Scheduler

# Who is cancelled may still have something to await; nothing of ours does so more often.
_BURIAL_ROUNDS = 20


class ProcessLoop:
    """What asyncio needs of a loop, on a `Scheduler`.

    work_s: how long what the process gives to a thread takes. broken: is told of exceptions that nobody catches.
    """

    # Killed: nothing more is called.
    dead = False

    def __init__(self, scheduler: Scheduler, *, work_s: Callable[[], float], broken: Callable[[str], None]) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        # What was due when the process died, and what comes of it; run when it is buried.
        self._last_calls: deque[events.Handle] = deque()
        self._buried = False
        self._scheduler = scheduler
        self._loop = cast(asyncio.AbstractEventLoop, self)
        self._work_s = work_s
        self._broken = broken
        # What came due while the process was frozen; None while it is not.
        self._held: list[events.Handle] | None = None

    # -- the process around it

    def freeze(self) -> None:
        """SIGSTOP: time passes, and nothing is called."""
        if self._held is None:
            self._held = []

    def thaw(self) -> None:
        """SIGCONT: what came due meanwhile is called, in order."""
        held, self._held = self._held or [], None
        for handle in held:
            self._scheduler.after(0.0, self._run, handle)

    def bury(self) -> None:
        """After its death: let its coroutines end without effect, or they would complain when they are collected."""
        assert self.dead, "a process that lives is not buried"
        self._buried = True
        self._last_calls.extend(self._held or ())
        for _ in range(_BURIAL_ROUNDS):
            if not self._tasks:
                break
            for task in self._tasks:
                task.cancel()
            while self._last_calls:
                handle = self._last_calls.popleft()
                if not handle.cancelled():
                    self._call(handle)

    def run(self, call: Callable[[], object]) -> None:
        """Have something from outside happen in this process, such as a message that arrives."""
        self.call_soon(call)

    def _run(self, handle: events.Handle) -> None:
        if handle.cancelled():
            return
        if self.dead:
            if not isinstance(handle, events.TimerHandle):
                self._last_calls.append(handle)
            return
        if self._held is not None:
            self._held.append(handle)
            return
        self._call(handle)

    def _call(self, handle: events.Handle) -> None:
        events._set_running_loop(self._loop)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)

    # -- what asyncio asks of it

    def time(self) -> float:
        return self._scheduler.now_s

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> events.Handle:
        handle = events.Handle(callback, args, self._loop, context)
        if self._buried:
            self._last_calls.append(handle)
        else:
            self._scheduler.after(0.0, self._run, handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> events.TimerHandle:
        handle = events.TimerHandle(when, callback, args, self._loop, context)
        self._scheduler.after(max(0.0, when - self._scheduler.now_s), self._run, handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Context | None = None) -> events.TimerHandle:
        return self.call_at(self._scheduler.now_s + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def create_task(self, coro: Coroutine[Any, Any, Any], **how: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self._loop, **how)
        # A process that is killed leaves its tasks as they are.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch for that
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        done = self.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(func(*args))

        self.call_later(self._work_s(), finish)
        return done

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.dead:
            self._broken(f"{context.get('message')}: {type(error).__name__}: {error}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False
