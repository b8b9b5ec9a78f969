"""What a checkpoint remembers of its run: bounded, in order, and no step twice."""

from __future__ import annotations

import itertools
import math

import pytest
from stretto.chronicle import Chronicle, Point
from stretto.progress_report import StepFigures


def figures(step: int) -> StepFigures:
    return StepFigures(
        step, 1.5 * step, 1.5 * (step - 1), 1.5, 2.0, 1 / step, (0.15,), (0.1,), 1.0, 1.0, 16 * step, 0, 0.02
    )


def told(steps: range, *, limit: int = 500, generation: int = 1) -> Chronicle:
    chronicle = Chronicle(100.0, limit)
    for step in steps:
        chronicle.note(figures(step), generation=generation, workers=2, time_s=1e9 + step)
    return chronicle


def test_a_short_run_is_kept_step_by_step() -> None:
    points = list(told(range(1, 101)))
    assert [point.step for point in points] == list(range(1, 101))
    assert points[9] == Point(1e9 + 10, 1, 2, 10, 15.0, 1.5, 2.0, 0.1, 0.15, 0.1)


@pytest.mark.parametrize("steps", [500, 501, 12_345, 100_000])
def test_a_long_run_keeps_its_whole_length_in_few_points(steps: int) -> None:
    kept = [point.step for point in told(range(1, steps + 1))]
    assert 200 < len(kept) <= 500
    assert kept[0] == 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(kept)]
    assert max(gaps) <= 2 * steps / 200
    assert kept[-1] == steps, "the latest is always told"


def test_each_generations_first_step_is_kept() -> None:
    chronicle = Chronicle(100.0, limit=40)
    for step in range(1, 1001):
        chronicle.note(figures(step), generation=1 + step // 200, workers=2, time_s=float(step))
    firsts = {point.generation: point.step for point in reversed(list(chronicle))}
    assert firsts == {1: 1, 2: 200, 3: 400, 4: 600, 5: 800, 6: 1000}


def test_a_run_of_changes_alone_is_bounded_too() -> None:
    chronicle = Chronicle(100.0, limit=40)
    for step in range(1, 1001):
        chronicle.note(figures(step), generation=step, workers=2, time_s=float(step))
    assert len(chronicle) <= 40


def test_steps_that_are_done_again_take_the_place_of_the_first_try() -> None:
    chronicle = told(range(1, 11))
    chronicle.note(figures(8), generation=2, workers=1, time_s=2e9)
    assert [(point.step, point.generation) for point in chronicle][-2:] == [(7, 1), (8, 2)]


def test_what_is_saved_is_read_and_gone_on_from() -> None:
    chronicle = told(range(1, 2001), limit=100)
    chronicle.note(figures(2001), generation=2, workers=2, time_s=math.inf)
    saved = chronicle.state_dict()
    assert list(Chronicle.saved(saved)) == list(chronicle)
    assert Chronicle.saved(saved).target_tau == 100.0
    other = Chronicle(7.0, limit=100)
    other.load_state_dict(saved)
    assert other.target_tau == 7.0
    for each in (chronicle, other):
        for step in range(2002, 3000):
            each.note(figures(step), generation=2, workers=2, time_s=2e9 + step)
    assert list(other) == list(chronicle)


def test_columns_of_different_lengths_are_refused() -> None:
    saved = told(range(1, 5)).state_dict()
    saved["columns"]["tau"] = b""
    with pytest.raises(ValueError, match="differ in length"):
        Chronicle(1.0).load_state_dict(saved)
