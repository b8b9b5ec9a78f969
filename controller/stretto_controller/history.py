"""A job's generations as rows: what each began with, what became of it. Their steps add up to the job's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from stretto_controller.core.actions import BeginGeneration, EndGeneration, FirstStep, ReachTarget
from stretto_controller.store.contents import GenerationSummary


class History:
    """The rows of one incarnation, in order, each where the one before ends. A method returns the rows that changed.

    The last steps of a generation may be known to nobody but its workers, and what it did after the checkpoint that
    the next one begins with is undone. Both are settled by the next generation's first step, which says where it began.
    """

    def __init__(self, incarnation: int, rows: Iterable[GenerationSummary] = (), *, limit: int) -> None:
        """rows: as they were saved. limit: the oldest are forgotten beyond so many."""
        self.incarnation = incarnation
        self._limit = limit
        self._rows = {row.generation.number: row for row in rows if row.incarnation == incarnation}

    def begin(self, action: BeginGeneration, wall_s: float) -> list[GenerationSummary]:
        """A generation was assigned; it goes on where the last one stood, until its workers say otherwise."""
        latest = next(reversed(self._rows.values()), None)
        row = GenerationSummary(
            self.incarnation,
            action.generation,
            action.cause,
            started_s=wall_s,
            steps_before=_steps_after(latest) if latest else 0,
            first_tau=action.generation.first_tau,
            last_tau=action.generation.first_tau,
        )
        while len(self._rows) >= self._limit:
            del self._rows[next(iter(self._rows))]
        return self._put(row)

    def first_step(self, action: FirstStep) -> list[GenerationSummary]:
        """Its workers have begun, and said where."""
        changed = self._settle(self._current(action.generation), action.steps_before, action.tau_before)
        # More than one may have been done by now: how many, its last figures tell.
        row = changed[-1]
        return self._put(*changed[:-1], replace(row, steps=max(row.steps, 1), pause_s=action.pause_s))

    def end(self, action: EndGeneration, wall_s: float) -> list[GenerationSummary]:
        """The current generation is over."""
        row = self._current(action.generation.number)
        changed = self._settle(row, action.steps_before, action.first_tau) if action.steps else [row]
        row = changed[-1]
        ended = replace(
            row,
            generation=action.generation,
            steps=max(row.steps, action.steps),
            mean_gain=action.mean_gain,
            effective_lr=action.effective_lr,
            last_tau=action.last_tau if action.steps >= max(row.steps, 1) else row.last_tau,
            pause_s=action.pause_s,
            ended_s=wall_s,
            end_reason=action.reason,
        )
        return self._put(*changed[:-1], ended)

    def target_reached(self, action: ReachTarget) -> list[GenerationSummary]:
        """The generation, which may be over by now, did all steps that were left: who told of them last may be gone."""
        row = self._rows[action.generation]
        return self._put(replace(row, steps=max(row.steps, action.steps - row.steps_before), last_tau=action.tau))

    def _settle(self, row: GenerationSummary, steps: int, tau: float) -> list[GenerationSummary]:
        """The generation began after so many steps: those before are the earlier ones'. That row is the last."""
        earlier = [other for other in self._rows.values() if other is not row]
        changed = [new for old in earlier if (new := _undone(old, steps, tau)) != old]
        if not changed:
            changed = _continued(earlier, steps, tau)
        return [*changed, replace(row, steps_before=steps, first_tau=tau, last_tau=row.last_tau if row.steps else tau)]

    def _current(self, number: int) -> GenerationSummary:
        row = self._rows.get(number)
        assert row is not None, f"generation {number} went on, and had not begun"
        assert not row.ended_s, f"generation {number} went on, and had ended"
        return row

    def _put(self, *rows: GenerationSummary) -> list[GenerationSummary]:
        for row in rows:
            self._rows[row.generation.number] = row
        return list(rows)


def _steps_after(row: GenerationSummary) -> int:
    return row.steps_before + row.steps


def _undone(row: GenerationSummary, step: int, tau: float) -> GenerationSummary:
    """What is left of an earlier generation, now that a later one has begun after `step` steps."""
    if _steps_after(row) <= step:
        return row
    steps_before = min(row.steps_before, step)
    first_tau = min(row.first_tau, tau)
    return replace(row, steps_before=steps_before, steps=step - steps_before, first_tau=first_tau, last_tau=tau)


def _continued(rows: list[GenerationSummary], step: int, tau: float) -> list[GenerationSummary]:
    """The last that did steps did those, too, of which nobody had told; where none did, they are of an earlier job."""
    changed: list[GenerationSummary] = []
    for row in reversed(rows):
        if _steps_after(row) == step:
            break
        if row.steps:
            changed.append(replace(row, steps=step - row.steps_before, last_tau=tau))
            break
        changed.append(replace(row, steps_before=step, first_tau=tau, last_tau=tau))
    return changed
