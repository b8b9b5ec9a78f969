"""A job's curve: bounded whatever the run does, in order of time, and the same after a restart."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from stretto_controller.curve import Curve, Point


def point(time_s: float, step: int = 0, generation: int = 1) -> Point:
    return Point(time_s, generation, step, float(step), 1.5, 2.0, 0.1, 0.2, 0.1, 3.0)


def times(curve: Curve) -> list[float]:
    return [*dict(curve.columns())["time_s"]]


def test_points_closer_than_the_interval_are_left_out() -> None:
    curve = Curve(100, 1.0)
    for tenth in range(50):
        curve.note(point(tenth / 10))
    assert times(curve) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_last_point_of_a_run_is_kept_however_soon_it_comes() -> None:
    curve = Curve(100, 1.0)
    curve.note(point(0.0))
    curve.note(point(0.5, step=9), last=True)
    assert times(curve) == [0.0, 0.5]


def test_the_first_point_of_a_generation_is_kept_however_soon_it_comes() -> None:
    curve = Curve(100, 1.0)
    for time_s, generation in [(0.0, 1), (0.1, 1), (0.2, 2), (0.3, 2), (0.4, 3)]:
        curve.note(point(time_s, generation=generation))
    assert times(curve) == [0.0, 0.2, 0.4]


def test_time_never_goes_back_though_the_wall_clock_does() -> None:
    curve = Curve(100, 1.0)
    curve.note(point(100.0))
    curve.note(point(50.0, generation=2))
    first, second = times(curve)
    assert first < second


@given(st.integers(10, 60), st.lists(st.tuples(st.floats(0.0, 50.0), st.booleans()), max_size=400))
def test_a_curve_is_bounded_and_spread_over_the_whole_run(limit: int, waits: list[tuple[float, bool]]) -> None:
    curve, now_s, generation = Curve(limit, 1.0), 0.0, 1
    for wait_s, change in waits:
        now_s += wait_s
        generation += change
        curve.note(point(now_s, generation=generation))
    assert len(curve) <= limit
    assert all(a < b for a, b in pairwise(times(curve)))
    if waits:
        assert times(curve)[0] == waits[0][0], "the beginning is kept"


def test_a_long_run_keeps_between_half_and_all_of_its_points() -> None:
    curve = Curve(100, 1.0)
    for second in range(100_000):
        curve.note(point(float(second)))
        if second > 200:
            assert 50 <= len(curve) <= 100
    gaps = [b - a for a, b in pairwise(times(curve))]
    assert max(gaps) <= 4 * 100_000 / len(gaps)


def test_what_is_saved_piece_by_piece_is_the_whole_curve() -> None:
    curve, saved = Curve(20, 1.0), list[Point]()
    for second in range(200):
        curve.note(point(float(second), step=second))
        if second % 7 == 0:
            points, anew = curve.take_unsaved()
            saved = [*points] if anew else [*saved, *points]
    points, anew = curve.take_unsaved()
    saved = [*points] if anew else [*saved, *points]
    again = Curve(20, 1.0)
    again.load(saved)
    assert [*again.columns()] == [*curve.columns()]
    assert again.take_unsaved() == ((), False)


def test_columns_after_a_time_leave_out_what_was_seen() -> None:
    curve = Curve(100, 1.0)
    for second in range(5):
        curve.note(point(float(second), step=second))
    assert [*dict(curve.columns(2.0))["step"]] == [3.0, 4.0]
    assert curve.last_s == 4.0


def test_a_diverged_figure_is_kept_as_it_is() -> None:
    curve = Curve(100, 1.0)
    curve.note(point(0.0)._replace(loss=math.nan, gain=math.inf))
    columns = dict(curve.columns())
    assert math.isnan(columns["loss"][0])
    assert columns["gain"][0] == math.inf


def test_a_new_incarnation_begins_with_an_empty_curve() -> None:
    curve = Curve(100, 1.0)
    curve.note(point(1.0))
    curve.take_unsaved()
    curve.clear()
    assert len(curve) == 0
    curve.note(point(2.0))
    points, anew = curve.take_unsaved()
    assert ([p.time_s for p in points], anew) == ([2.0], True)
