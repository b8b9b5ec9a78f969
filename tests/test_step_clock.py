"""How long a live worker has been at what, and for how long nothing has moved."""

from __future__ import annotations

from stretto.live.step_clock import StepClock


def test_waiting_begins_with_the_oldest_operation_that_runs() -> None:
    clock = StepClock()
    clock.step(10.0)
    assert clock.read(11.0) == (1.0, 0.0, 0.0)
    first, second = clock.begin(12.0), clock.begin(13.0)
    assert clock.read(15.0) == (0.0, 3.0, 0.0)
    clock.end(first, 15.0)
    assert clock.read(16.0) == (0.0, 3.0, 0.0)
    clock.end(second, 16.0)
    assert clock.read(18.0) == (2.0, 0.0, 0.0)


def test_the_median_is_that_of_recent_steps() -> None:
    clock = StepClock()
    for now_s in (0.0, 1.0, 3.0, 6.0):
        clock.step(now_s)
    assert clock.read(6.0)[2] == 2.0


def test_a_worker_that_waits_where_nobody_sees_it_is_quiet() -> None:
    """DDP's own collectives, in its constructor and in its second step, or the transfer of a state."""
    clock = StepClock()
    clock.enter(5.0)
    assert clock.quiet_s(9.0) == 4.0
    clock.step(10.0)
    operation = clock.begin(11.0)
    assert clock.quiet_s(12.0) == 2.0
    clock.end(operation, 13.0)
    assert clock.read(20.0) == (7.0, 0.0, 0.0)
    assert clock.quiet_s(20.0) == 7.0
