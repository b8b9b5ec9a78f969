"""Operations in flight: each is a future of ours, which a cut fails at once wherever somebody waits for it.

A future whose result is on a GPU keeps torch's promise for such futures: whoever waits for it, or runs in a callback of
it, has the result on his current stream.
- gloo completes its future in a thread of its own when the copy back to the GPU is under way on that thread's current
  stream; ours is completed there too, so it records what to wait for on that stream.
- NCCL completes its future before the GPU has begun. Ours is completed when the GPU is done (Completions).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from stretto.group import torch_private
from stretto.group.completions import Completions
from stretto.group.failures import GroupBroken

T = TypeVar("T")


class Work(Protocol):
    """What is used of torch's work."""

    def get_future(self) -> torch.futures.Future[Any]: ...

    def get_future_result(self) -> torch.futures.Future[Any]: ...


class Operations:
    """The futures of one generation. Any thread may call anything here.

    `_lock` guards the fields; it is held for dictionary work only, never while torch, a callback or the kernel runs.
    `on_failure` is called in gloo's thread when an operation fails by itself; it must see to it that `break_with` is
    called, by itself or by another thread that is about to. `completions`: where results on a GPU come by NCCL.
    """

    def __init__(self, on_failure: Callable[[Exception], None], completions: Completions | None = None) -> None:
        self._lock = threading.Lock()
        self._on_failure = on_failure
        self._completions = completions
        self._broken: GroupBroken | None = None
        self._waiting: set[torch.futures.Future[Any]] = set()  # ours, not completed yet
        self._running: dict[torch.futures.Future[Any], torch.futures.Future[Any]] = {}  # torch's, by ours

    @property
    def broken(self) -> GroupBroken | None:
        with self._lock:
            return self._broken

    def start(self, begin: Callable[[], Work], result: T) -> torch.futures.Future[T]:
        """Begin an operation; return a future that gets `result` when it is done, or fails when the group breaks.

        In a broken group nothing begins and the future has failed already.
        """
        devices = gpus_of(result)
        future: torch.futures.Future[T] = new_future(devices)
        broken = self.broken
        if broken is not None:
            torch_private.fail(future, broken.again)
            return future
        work = begin()
        inner = work.get_future()
        with self._lock:
            self._running[future] = inner
            broken = self._broken
            if broken is None:
                self._waiting.add(future)
        if broken is not None:
            torch_private.fail(future, broken.again)
        completions = self._completions
        if devices and completions is not None:
            # Runs right now, on a stream that waits for the operation.
            inner.add_done_callback(
                lambda _: completions.add(work.get_future_result(), lambda: self._complete(future, result))
            )
        else:
            # The callback must not hold `inner`: torch keeps the callback with it, and the two would never be freed.
            inner.add_done_callback(lambda done: self._settle(done, future, result))
        return future

    def break_with(self, broken: GroupBroken) -> None:
        """Fail every open future, and every later one, with this; the first call counts."""
        with self._lock:
            if self._broken is not None:
                return
            self._broken = broken
            victims = list(self._waiting)
            self._waiting.clear()
        if self._completions is not None:
            self._completions.close()
        for future in victims:
            torch_private.fail(future, broken.again)

    def take_running(self) -> list[torch.futures.Future[Any]]:
        """Torch's own futures of operations that have not ended, failed by a cut or not. They are not kept here."""
        with self._lock:
            running = list(self._running.values())
            self._running.clear()
        return running

    def _settle(self, done: torch.futures.Future[Any], future: torch.futures.Future[T], result: T) -> None:
        """Runs in the thread that completed the operation: one of gloo's."""
        try:
            done.value()
        except Exception as error:  # noqa: BLE001 - torch raises several kinds
            with self._lock:
                self._running.pop(future, None)
            self._on_failure(error.with_traceback(None))  # fails `future` too
            return
        self._complete(future, result)

    def _complete(self, future: torch.futures.Future[T], result: T) -> None:
        with self._lock:
            self._running.pop(future, None)
            mine = future in self._waiting
            self._waiting.discard(future)
        if mine:
            future.set_result(result)


def gpus_of(result: object) -> list[torch.device]:
    """The GPUs that a result is on: a tensor, several of them, or something else, which is on none."""
    several = result if isinstance(result, list | tuple) else (result,)
    return list(dict.fromkeys(each.device for each in several if isinstance(each, torch.Tensor) and each.is_cuda))


def new_future(devices: list[torch.device]) -> torch.futures.Future[Any]:
    """One whose result may be on these devices and no others."""
    return torch.futures.Future(devices=[*devices]) if devices else torch.futures.Future()
