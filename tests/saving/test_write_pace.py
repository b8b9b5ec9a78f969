"""A save beside training keeps to its share of a core, until somebody waits for it."""

from __future__ import annotations

import threading
import time

import pytest
from stretto.checkpoint.errors import Abandoned
from stretto.checkpoint.pace import Pace


def _work(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


def test_work_takes_as_much_longer_as_the_share_says() -> None:
    pace, begun_s, begun_cpu_s = Pace(0.25), time.monotonic(), time.thread_time()
    for _ in range(3):
        with pace.kept():
            _work(0.01)
    assert time.monotonic() - begun_s >= 0.99 * (time.thread_time() - begun_cpu_s - 0.001) / 0.25


def test_who_waits_is_not_kept_waiting() -> None:
    pace = Pace(1e-6)
    threading.Timer(0.05, pace.hurry).start()
    with pace.kept():  # would rest for hours
        _work(0.01)
    with pace.kept():
        _work(0.01)
    assert not pace.cancelled


def test_a_save_that_is_given_up_does_no_more() -> None:
    pace = Pace(None)
    assert not pace.leisurely
    pace.cancel()
    with pytest.raises(Abandoned), pace.kept():
        raise AssertionError("nothing is done")
