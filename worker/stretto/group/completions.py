"""When the GPU has really done an operation. To torch, one of NCCL is done as soon as the GPU has been told of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stretto.group.plan import GroupSettings

_SUCCESS = 0
_VERDICTS = {1: "a timeout", 2: "an error of the communicator"}  # as torch numbers what NCCL's thread has found out


class Gpu:
    """The GPU, as far as completions ask it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside: torch.cuda.Stream | None = None

    def mark(self) -> Callable[[], bool]:
        """Return what tells, without waiting, whether the GPU has done all that the current stream was given."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        event.record(torch.cuda.current_stream(self._device))
        query: Callable[[], bool] = event.query
        return query

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Make a stream of our own the current one: what waits for it does not wait for anybody else's work."""
        if self._beside is None:
            self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        with torch.cuda.stream(self._beside):
            yield


@dataclass(frozen=True)
class _Operation:
    ended: Callable[[], bool]
    verdict: torch.futures.Future[int]
    complete: Callable[[], None]
    began_s: float


class Completions:
    """Completes operations when they have ended on the GPU: in their order, in a thread of its own.

    So nobody who waits for one waits inside of CUDA, where a cut could not reach him before the abort is through, and
    nobody goes on with what an aborted operation has left in a tensor. `left` says which peers have left the
    generation: what waits for them never ends. `on_failure` is called in the thread, for the first that fails.
    """

    def __init__(
        self, gpu: Gpu, settings: GroupSettings, *, left: Callable[[], str], on_failure: Callable[[Exception], None]
    ) -> None:
        self._gpu = gpu
        self._settings = settings
        self._left = left
        self._on_failure = on_failure
        self._changed = threading.Condition()  # guards the two fields below; held for work on them only
        self._operations: deque[_Operation] = deque()
        self._closed = False
        threading.Thread(target=self._run, name="stretto-completions", daemon=True).start()

    def add(self, verdict: torch.futures.Future[Any], complete: Callable[[], None]) -> None:
        """Call `complete` when all that the current stream was given is done.

        verdict: what NCCL's own thread says of the operation, early only when it has failed.
        """
        operation = _Operation(self._gpu.mark(), verdict, complete, time.monotonic())
        with self._changed:
            self._operations.append(operation)
            self._changed.notify()

    def close(self) -> None:
        """Complete nothing any more. From any thread; returns at once."""
        with self._changed:
            self._closed = True
            self._operations.clear()
            self._changed.notify()

    def _run(self) -> None:
        try:
            while (operation := self._next()) is not None:
                if self._wait_for(operation):
                    with self._gpu.beside():
                        operation.complete()
        except Exception as error:  # noqa: BLE001 - CUDA's among them
            self.close()
            self._on_failure(error.with_traceback(None))

    def _next(self) -> _Operation | None:
        with self._changed:
            while not self._operations and not self._closed:
                self._changed.wait()
            return None if self._closed else self._operations.popleft()

    def _wait_for(self, operation: _Operation) -> bool:
        """Whether it has ended; False when completions were closed meanwhile."""
        while not operation.ended():
            problem = self._problem(operation, time.monotonic() - operation.began_s)
            if problem:
                raise RuntimeError(problem)
            with self._changed:
                if self._closed or self._changed.wait_for(lambda: self._closed, self._settings.gpu_interval_s):
                    return False
        return True

    def _problem(self, operation: _Operation, age_s: float) -> str:
        if operation.verdict.done() and (verdict := operation.verdict.value()) != _SUCCESS:
            return f"NCCL reports {_VERDICTS.get(verdict, f'result {verdict}')}"
        if age_s > self._settings.operation_timeout_s:
            return f"an operation has not ended on the GPU within {self._settings.operation_timeout_s:g} s"
        return self._left() if age_s > self._settings.left_behind_s else ""
