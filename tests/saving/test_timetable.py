"""When to save, and what to delete: decided without a clock or a file."""

from __future__ import annotations

import itertools
import random

import pytest
from stretto.checkpoint.name import CheckpointName
from stretto.checkpoint.retention import Found, must_be_read, superfluous, to_verify
from stretto.checkpoint.timetable import Interval, Moment, Timetable


def _run(
    interval: Interval, *, step_s: float, save_s: float, steps: int, rng: random.Random | None = None
) -> tuple[list[int], int, int]:
    """Train on a clock of our own: where saves began, the most steps that were ever at stake, and the waits."""
    timetable, now_s, begun, waits, at_stake = Timetable(interval), 0.0, list[int](), 0, 0
    covered, done_s = 0, float("inf")
    timetable.reset(Moment(0.0, 0, 0.0))
    for step in range(steps):
        if now_s >= done_s:
            timetable.committed(done_s)
            covered, done_s = begun[-1], float("inf")
        if timetable.must_wait(Moment(now_s, step, 2.0 * step)):
            assert done_s < float("inf"), "one waits only for a save that is running"
            waits, now_s = waits + 1, max(done_s, now_s)
            timetable.committed(now_s)
            covered, done_s = begun[-1], float("inf")
        now_s += step_s * (rng.uniform(0.5, 1.5) if rng else 1.0)
        at_stake = max(at_stake, step + 1 - covered)
        if timetable.due(Moment(now_s, step + 1, 2.0 * (step + 1))):
            assert done_s == float("inf"), "no save is begun twice"
            timetable.began(Moment(now_s, step + 1, 2.0 * (step + 1)))
            begun.append(step + 1)
            done_s = now_s + save_s * (rng.uniform(0.5, 1.5) if rng else 1.0)
    return begun, at_stake, waits


@pytest.mark.parametrize("save_s", [0.0, 0.01, 0.1, 3.0, 100.0])
@pytest.mark.parametrize(
    "interval", [Interval(steps=25), Interval(tau=50.0), Interval(seconds=2.5), Interval(seconds=900.0, steps=25)]
)
def test_never_more_than_one_interval_is_at_stake(interval: Interval, save_s: float) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    begun, at_stake, _ = _run(interval, step_s=0.1, save_s=save_s, steps=2000, rng=random.Random(seed))
    limit = 25 if interval.seconds != 2.5 else 2.5 / (0.1 * 0.5) + 1
    assert at_stake <= limit
    assert begun


def test_a_save_begins_early_enough_that_nobody_waits() -> None:
    begun, _, waits = _run(Interval(seconds=10.0), step_s=0.1, save_s=1.5, steps=1000)
    assert waits == 0
    gaps = {later - earlier for earlier, later in itertools.pairwise(begun[1:])}
    assert gaps <= {70, 71}, "10 s less twice 1.5 s"


def test_where_a_save_takes_longer_than_the_interval_training_waits_for_it() -> None:
    _, at_stake, waits = _run(Interval(steps=10), step_s=0.1, save_s=5.0, steps=200)
    assert at_stake == 10
    assert waits > 10


def test_after_a_failure_the_next_save_is_due_an_interval_later() -> None:
    timetable = Timetable(Interval(seconds=10.0))
    timetable.began(Moment(20.0, 200, 0.0))
    timetable.failed()
    assert not timetable.due(Moment(24.0, 240, 0.0))
    assert timetable.due(Moment(30.0, 300, 0.0))
    assert not timetable.must_wait(Moment(30.0, 300, 0.0)), "there is nothing to wait for"


def test_a_save_that_was_dropped_is_due_at_once() -> None:
    timetable = Timetable(Interval(steps=10))
    timetable.began(Moment(1.0, 10, 0.0))
    timetable.dropped()
    assert timetable.due(Moment(1.1, 11, 0.0))


def test_without_an_interval_nothing_is_ever_due() -> None:
    assert not Timetable(Interval()).due(Moment(1e9, 10**9, 1e9))


def _found(
    step: int, *, tau: float = 0.0, whole: bool = True, verified: bool = False, read: bool | None = None
) -> Found:
    return Found(CheckpointName(1, step, step), tau, whole or verified, verified, verified if read is None else read)


def _deleted(found: list[Found], keep: int, every: float | None = None) -> list[int]:
    return sorted(name.step for name in superfluous(found, keep=keep, keep_every_tau=every))


def test_what_is_not_known_to_be_right_is_not_counted_but_goes_when_it_is_old() -> None:
    found = [_found(5, verified=True), _found(4, whole=False), _found(3), _found(2, verified=True)]
    found += [_found(1), _found(0, whole=False)]
    assert _deleted(found, keep=2) == [0, 1]


def test_the_newest_verified_one_never_goes() -> None:
    found = [_found(step) for step in (5, 4, 3)] + [_found(1, verified=True), _found(0)]
    assert _deleted(found, keep=2) == [], "one more has to be verified"
    assert _deleted(found, keep=1) == [0]
    assert _deleted([_found(step) for step in range(9)], keep=1) == [], "nothing is known to be right"


def test_the_first_checkpoint_after_each_multiple_of_tau_stays() -> None:
    found = [_found(step, tau=4.0 * step, verified=step == 9) for step in range(10)]
    assert _deleted(found, keep=1, every=10.0) == [0, 1, 2, 4, 6, 7]


def test_as_many_are_read_as_have_to_be_right_before_something_goes() -> None:
    found = [_found(5, verified=True), _found(4, whole=False), _found(3), _found(2), _found(1)]
    assert to_verify(found, keep=2) == CheckpointName(1, 3, 3)
    assert to_verify(found, keep=1) is None
    assert to_verify(found, keep=4) is None, "nothing can go"
    found[2] = _found(3, verified=True)
    assert to_verify(found, keep=2) is None


def test_what_was_only_written_is_no_reason_to_delete_what_was_read() -> None:
    found = [_found(step, verified=True, read=step == 2) for step in range(6)]
    assert _deleted(found, keep=1) == [0, 1]
    assert _deleted([_found(step, verified=True, read=False) for step in range(6)], keep=1) == []


@pytest.mark.parametrize(("keep", "read"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (9, [])])
def test_one_in_so_many_as_are_kept_is_read_again(keep: int, read: list[int]) -> None:
    found: list[Found] = []
    for step in range(8):
        name = CheckpointName(1, step, step)
        wanted = must_be_read(name, found, keep=keep, keep_every_tau=None)
        assert wanted == (step in read)
        found.append(_found(step, verified=True, read=wanted))
        doomed = superfluous(found, keep=keep, keep_every_tau=None)
        found = [each for each in found if each.name not in doomed]
        assert len(found) == min(step + 1, keep)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_there_the_newest_verified_ones_stay(seed: int) -> None:
    rng = random.Random(seed)
    found = [
        _found(step, tau=rng.uniform(0, 50), whole=rng.random() < 0.8, verified=rng.random() < 0.4)
        for step in rng.sample(range(100), 12)
    ]
    keep, every = rng.randint(1, 4), rng.choice([None, 10.0])
    right = sorted((each.name.step for each in found if each.verified), reverse=True)
    left = {each.name.step for each in found} - set(_deleted(found, keep, every))
    assert set(right[:keep]) <= left
    if len(right) >= keep and every is None:
        assert min(left) == right[keep - 1]
