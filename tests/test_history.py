"""The rows of a job's history: each generation's steps once, whatever its workers could tell before they ended."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stretto_controller.core.actions import BeginGeneration, EndGeneration, FirstStep, ReachTarget
from stretto_controller.core.model import Cause, Generation
from stretto_controller.history import History
from stretto_controller.store.contents import GenerationSummary

Figures = tuple[int, int, float, float]


class Story:
    """Generations one after the other, and the rows as a store would hold them: the latest of each number."""

    def __init__(self) -> None:
        self.history = History(1, limit=1000)
        self.saved: dict[int, GenerationSummary] = {}

    def _note(self, rows: list[GenerationSummary]) -> None:
        self.saved |= {row.generation.number: row for row in rows}

    def begin(self, number: int) -> Generation:
        generation = Generation(number, (), 1.0, "why")
        self._note(self.history.begin(BeginGeneration(generation, Cause.GROW), 1.0))
        return generation

    def first_step(self, number: int, step: int) -> None:
        """Here tau is twice the number of steps."""
        self._note(self.history.first_step(FirstStep(number, Cause.GROW, 0.5, step, 2.0 * step)))

    def end(self, generation: Generation, told: int = 0, *, began: int | None = None) -> None:
        """told: the step of the latest report; 0 where nothing was told since the controller began."""
        began = self.saved[generation.number].steps_before if began is None else began
        figures = EndGeneration(generation, began, told - began, 2.0 * began, 2.0, 0.1, 2.0 * told, 0.5, "over")
        untold = EndGeneration(generation, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, "over")
        self._note(self.history.end(figures if told else untold, 2.0))

    def target(self, number: int, step: int) -> None:
        self._note(self.history.target_reached(ReachTarget(number, step, 2.0 * step)))

    def lived(self, number: int, began: int, told: int) -> None:
        """A generation that began after `began` steps and told of those up to `told`."""
        generation = self.begin(number)
        self.first_step(number, began)
        self.end(generation, told)

    def restart(self) -> None:
        self.history = History(1, self.saved.values(), limit=1000)

    @property
    def figures(self) -> list[Figures]:
        rows = self.saved.values()
        return [(row.steps_before, row.steps, row.first_tau, row.last_tau) for row in rows]


def test_a_step_that_only_the_workers_knew_of_is_its_generations() -> None:
    story = Story()
    story.lived(1, 0, 40)
    story.lived(2, 41, 50)
    assert story.figures == [(0, 41, 0.0, 82.0), (41, 9, 82.0, 100.0)]


def test_what_came_after_the_checkpoint_that_was_loaded_does_not_count() -> None:
    story = Story()
    story.lived(1, 0, 40)
    story.lived(2, 40, 60)
    story.lived(3, 25, 70)
    assert story.figures == [(0, 25, 0.0, 50.0), (25, 0, 50.0, 50.0), (25, 45, 50.0, 140.0)]


def test_a_generation_that_did_no_step_is_given_none() -> None:
    """It was formed, and broke before its first: the steps that nobody had told of are those of the one before."""
    story = Story()
    story.lived(1, 0, 40)
    story.end(story.begin(2))
    story.lived(3, 41, 50)
    assert story.figures == [(0, 41, 0.0, 82.0), (41, 0, 82.0, 82.0), (41, 9, 82.0, 100.0)]


def test_a_generation_whose_figures_are_lost_with_the_controller_keeps_its_steps() -> None:
    story = Story()
    story.lived(1, 0, 40)
    generation = story.begin(2)
    story.first_step(2, 40)
    story.restart()
    story.end(generation)
    story.lived(3, 60, 70)
    assert story.figures == [(0, 40, 0.0, 80.0), (40, 20, 80.0, 120.0), (60, 10, 120.0, 140.0)]


def test_a_first_step_that_is_told_again_changes_nothing() -> None:
    story = Story()
    story.lived(1, 0, 40)
    generation = story.begin(2)
    story.first_step(2, 40)
    story.restart()
    story.first_step(2, 40)
    story.end(generation, 50)
    assert story.figures == [(0, 40, 0.0, 80.0), (40, 10, 80.0, 100.0)]


def test_a_job_that_goes_on_from_an_older_jobs_checkpoint_begins_there() -> None:
    story = Story()
    story.end(story.begin(1))
    story.lived(2, 500, 520)
    assert story.figures == [(500, 0, 1000.0, 1000.0), (500, 20, 1000.0, 1040.0)]


def test_a_first_step_that_the_controller_missed_is_told_with_the_last() -> None:
    """It was killed, and what it had decided last was not saved: the checkpoint before was loaded."""
    story = Story()
    story.lived(1, 0, 40)
    generation = story.begin(2)
    story.end(generation, 75, began=25)
    story.lived(3, 75, 80)
    assert sum(steps for _, steps, _, _ in story.figures) == 80


@pytest.mark.parametrize("over", [False, True], ids=["while it runs", "when it is over"])
def test_the_last_generation_has_all_steps_up_to_the_target(over: bool) -> None:
    """Rank 0 may die between its last step and its last report, and the others break while they end."""
    story = Story()
    story.lived(1, 0, 40)
    generation = story.begin(2)
    story.first_step(2, 40)
    if over:
        story.end(generation, 60)
    story.target(2, 63)
    if not over:
        story.end(generation, 60)
    assert story.figures == [(0, 40, 0.0, 80.0), (40, 23, 80.0, 126.0)]


def test_the_oldest_rows_are_forgotten() -> None:
    history = History(1, limit=2)
    for number in (1, 2, 3):
        generation = Generation(number, (), 1.0, "why")
        history.begin(BeginGeneration(generation, Cause.GROW), 1.0)
        changed = history.first_step(FirstStep(number, Cause.GROW, 0.5, 10 * number, 10.0 * number))
        history.end(EndGeneration(generation, 10 * number, 1, 10.0 * number, 1.0, 0.1, 1.0, 0.5, "over"), 2.0)
    assert [row.generation.number for row in changed] == [2, 3]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30), st.booleans()), min_size=1, max_size=12))
def test_the_steps_of_all_rows_add_up_to_where_the_job_stands(lives: list[tuple[int, int, bool]]) -> None:
    """Whatever each generation began with, and told, and whether it came to a step at all."""
    story, stands = Story(), 0
    for number, (began, steps, trains) in enumerate(lives, start=1):
        if trains:
            story.lived(number, began, began + steps)
            stands = began + steps
        else:
            story.end(story.begin(number))
    rows = story.figures
    assert all(before + steps == after for (before, steps, _, _), (after, _, _, _) in pairwise(rows))
    assert all(steps >= 0 for _, steps, _, _ in rows)
    assert rows[0][0] + sum(steps for _, steps, _, _ in rows) == stands
