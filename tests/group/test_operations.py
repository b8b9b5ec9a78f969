"""Futures that a break fails, against torch's futures completed by hand."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from stretto.group.failures import GroupBroken
from stretto.group.operations import Operations

Future = torch.futures.Future[Any]


class Work:
    """What torch returns when an operation begins, as far as it is used."""

    def __init__(self, future: Future | None = None) -> None:
        self._future = future or Future()

    def get_future(self) -> Future:
        return self._future

    def get_future_result(self) -> Future:
        raise AssertionError("only NCCL is asked for this")


class Failures:
    def __init__(self) -> None:
        self.seen: list[Exception] = []
        self.operations = Operations(self.on_failure)

    def on_failure(self, error: Exception) -> None:
        self.seen.append(error)
        self.operations.break_with(GroupBroken(f"failed: {error}"))


def test_a_future_gets_its_result_when_torchs_is_done() -> None:
    operations, inner = Failures().operations, Future()
    future = operations.start(lambda: Work(inner), "result")
    assert not future.done()
    inner.set_result([1])
    assert future.wait() == "result"
    assert operations.take_running() == []


def test_a_break_fails_what_is_open_and_what_comes_later_but_not_what_is_done() -> None:
    operations, done, running = Failures().operations, Future(), Future()
    first, second = operations.start(lambda: Work(done), 1), operations.start(lambda: Work(running), 2)
    done.set_result(None)
    operations.break_with(GroupBroken("one"))
    operations.break_with(GroupBroken("two"))
    assert first.wait() == 1
    with pytest.raises(GroupBroken, match="one"):
        second.wait()

    def begin() -> Work:
        raise AssertionError("nothing begins in a broken group")

    with pytest.raises(GroupBroken, match="one"):
        operations.start(begin, 3).wait()
    assert operations.take_running() == [running]  # torch still works on it
    running.set_result(None)
    assert operations.take_running() == []


def test_an_operation_that_fails_by_itself_breaks_the_group() -> None:
    failures, first, second = Failures(), Future(), Future()
    futures = [failures.operations.start(lambda inner=inner: Work(inner), None) for inner in (first, second)]  # type: ignore[misc]  # mypy cannot infer a lambda's default
    first.set_exception(RuntimeError("Connection closed by peer"))
    assert [str(error) for error in failures.seen] == ["Connection closed by peer"]
    for future in futures:
        with pytest.raises(GroupBroken, match="failed: Connection closed by peer"):
            future.wait()


def test_a_thread_that_waits_is_released_by_a_break_in_another() -> None:
    operations = Failures().operations
    future = operations.start(Work, None)
    timer = threading.Timer(0.05, lambda: operations.break_with(GroupBroken("cut")))
    timer.start()
    with pytest.raises(GroupBroken, match="cut"):
        future.wait()
    timer.join()


def test_a_break_between_beginning_and_noting_an_operation_still_fails_it() -> None:
    operations = Failures().operations

    def begin() -> Work:
        operations.break_with(GroupBroken("meanwhile"))
        return Work()

    with pytest.raises(GroupBroken, match="meanwhile"):
        operations.start(begin, None).wait()


def test_waiting_for_a_broken_operation_keeps_nothing_of_the_waiter_alive() -> None:
    """A future that holds the exception it raises is part of a cycle through C++, with every tensor of the waiter."""
    operations = Operations(lambda error: None)

    def waiter() -> weakref.ref[torch.Tensor]:
        tensor = torch.ones(1)
        running = Future()
        future = operations.start(lambda: Work(running), tensor)
        chained = future.then(lambda done: done.value())
        operations.break_with(GroupBroken("cut"))
        for each in (future, future, chained):
            with pytest.raises((GroupBroken, RuntimeError), match="cut"):
                each.wait()
        running.set_result(None)
        return weakref.ref(tensor)

    gone = waiter()
    gc.collect()
    assert gone() is None


def test_finished_operations_keep_nothing_alive_without_the_garbage_collector() -> None:
    operations, inner = Failures().operations, Future()
    tensor = torch.ones(1)
    gone = weakref.ref(tensor)
    begun = [Work(inner)]
    gc.disable()
    try:
        future = operations.start(begun.pop, tensor)
        inner.set_result(None)
        future.wait()
        del tensor, future, inner
        assert gone() is None
    finally:
        gc.enable()
