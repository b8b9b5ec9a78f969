"""Operations that end on a GPU, with the GPU replaced by marks that the test passes by hand."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stretto.group import operations as operations_module
from stretto.group.completions import Completions
from stretto.group.failures import GroupBroken
from stretto.group.operations import Operations
from stretto.group.plan import GroupSettings

LIMIT_S = 10.0
Future = torch.futures.Future[Any]


class HandGpu:
    """Each mark is passed when the test says so."""

    def __init__(self) -> None:
        self.marks: list[threading.Event] = []
        self.inside = 0

    def mark(self) -> Callable[[], bool]:
        event = threading.Event()
        self.marks.append(event)
        return event.is_set

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.inside += 1
        yield
        self.inside -= 1


class Bench:
    """Completions on that GPU, and what came of them."""

    def __init__(self, settings: GroupSettings | None = None) -> None:
        self.gpu = HandGpu()
        self.left = ""
        self.failure: Exception | None = None
        self.failed = threading.Event()
        self.completed: list[str] = []
        self.changed = threading.Condition()
        self.completions = Completions(
            self.gpu,  # type: ignore[arg-type]  # as far as it is asked
            settings or GroupSettings(),
            left=lambda: self.left,
            on_failure=self._fail,
        )

    def add(self, name: str, verdict: Future | None = None) -> None:
        self.completions.add(verdict or Future(), lambda: self._complete(name))

    def eventually(self, names: list[str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.completed == names, LIMIT_S), self.completed

    def _complete(self, name: str) -> None:
        assert self.gpu.inside == 1, "completed outside of the stream that is set aside for it"
        with self.changed:
            self.completed.append(name)
            self.changed.notify_all()

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.failed.set()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.completions.close()


def test_operations_are_completed_in_their_order_and_none_before_the_gpu_has_done_it(bench: Bench) -> None:
    for name in ("first", "second", "third"):
        bench.add(name)
    first, second, third = bench.gpu.marks
    second.set()
    assert bench.completed == []
    first.set()
    bench.eventually(["first", "second"])
    third.set()
    bench.eventually(["first", "second", "third"])
    assert bench.failure is None


@pytest.mark.parametrize(("verdict", "words"), [(1, "a timeout"), (2, "an error of the communicator"), (9, "result 9")])
def test_what_nccl_finds_out_fails_the_operation_although_it_would_never_end(
    bench: Bench, verdict: int, words: str
) -> None:
    said = Future()
    bench.add("stuck", said)
    bench.add("behind it")
    said.set_result(verdict)
    assert bench.failed.wait(LIMIT_S)
    assert str(bench.failure) == f"NCCL reports {words}"
    for mark in bench.gpu.marks:
        mark.set()
    bench.add("later")
    assert bench.completed == []


def test_an_operation_that_ended_is_completed_whatever_nccl_said_before(bench: Bench) -> None:
    good = Future()
    good.set_result(0)
    bench.add("good", good)
    bench.gpu.marks[0].set()
    bench.eventually(["good"])


def test_an_operation_that_takes_too_long_fails() -> None:
    bench = Bench(GroupSettings(operation_timeout_s=0.05))
    bench.add("stuck")
    assert bench.failed.wait(LIMIT_S)
    assert str(bench.failure) == "an operation has not ended on the GPU within 0.05 s"


def test_who_left_ends_what_waits_for_him_after_a_while() -> None:
    bench = Bench(GroupSettings(left_behind_s=0.02))
    bench.left = "rank 2 has left the generation"
    bench.add("never begun by rank 2")
    assert bench.failed.wait(LIMIT_S)
    assert str(bench.failure) == "rank 2 has left the generation"


def test_an_error_of_the_gpu_is_told() -> None:
    bench = Bench()

    def broken() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.gpu.mark = lambda: broken  # type: ignore[method-assign]
    bench.add("first")
    assert bench.failed.wait(LIMIT_S)
    assert "illegal memory access" in str(bench.failure)


class NcclWork:
    """As torch returns it from NCCL: its future is done before the GPU has begun."""

    def __init__(self) -> None:
        self.verdict = Future()
        self._future = Future()
        self._future.set_result(None)

    def get_future(self) -> Future:
        return self._future

    def get_future_result(self) -> Future:
        return self.verdict


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every result count as one on a GPU; without one there are no futures for such results."""
    monkeypatch.setattr(operations_module, "gpus_of", lambda result: [torch.device("cuda", 0)])
    monkeypatch.setattr(operations_module, "new_future", lambda devices: Future())


@pytest.mark.usefixtures("on_gpu")
def test_a_future_of_nccl_waits_for_the_gpu(bench: Bench) -> None:
    operations = Operations(lambda error: None, bench.completions)
    future = operations.start(NcclWork, "result")
    assert not future.done()
    bench.gpu.marks[0].set()
    assert future.wait() == "result"
    assert operations.take_running() == []


@pytest.mark.usefixtures("on_gpu")
def test_a_break_releases_who_waits_for_the_gpu_and_what_an_abort_leaves_there_reaches_nobody(bench: Bench) -> None:
    operations = Operations(lambda error: None, bench.completions)
    futures = [operations.start(NcclWork, "garbage") for _ in range(2)]
    timer = threading.Timer(0.05, lambda: operations.break_with(GroupBroken("cut")))
    timer.start()
    with pytest.raises(GroupBroken, match="cut"):
        futures[0].wait()
    for mark in bench.gpu.marks:
        mark.set()  # the aborted kernels end
    with pytest.raises(GroupBroken, match="cut"):
        futures[1].wait()
    assert len(operations.take_running()) == 2  # the reaper gets them: they hold tensors until the abort is through
    timer.join()


@pytest.mark.usefixtures("on_gpu")
def test_what_nccl_finds_out_breaks_the_group(bench: Bench) -> None:
    operations = Operations(lambda error: None, bench.completions)
    work = NcclWork()
    future = operations.start(lambda: work, None)
    work.verdict.set_result(2)
    assert bench.failed.wait(LIMIT_S)
    operations.break_with(GroupBroken(str(bench.failure)))
    with pytest.raises(GroupBroken, match="NCCL reports an error of the communicator"):
        future.wait()


@pytest.mark.usefixtures("on_gpu")
def test_results_of_gloo_are_there_when_gloo_says_so() -> None:
    operations = Operations(lambda error: None)  # no NCCL in this group
    inner = Future()

    class GlooWork(NcclWork):
        def get_future(self) -> Future:
            return inner

    future = operations.start(GlooWork, "result")
    assert not future.done()
    inner.set_result([None])
    assert future.wait() == "result"


def test_results_on_the_host_are_on_no_gpu() -> None:
    for result in (torch.ones(1), [torch.ones(1), torch.ones(2)], None, "text"):
        assert operations_module.gpus_of(result) == []
    assert operations_module.new_future([]).done() is False
