"""How long each part of a generation change took, read off the decisions as they are shown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stretto_controller.core.actions import Action, BeginGeneration, EndGeneration, FirstStep
from stretto_controller.core.model import Cause, JobState


@dataclass(frozen=True, slots=True)
class ChangeTimes:
    """One change of a job's generation, in wall-clock seconds for display only. None: it did not come to that."""

    job: str
    # The first of those who joined was ready, or the change was decided.
    started_s: float
    # From here on the workers leave: they were asked to, or the generation broke.
    prepared_s: float
    # The old generation is over for every member.
    left_s: float | None = None
    # The new one has its places.
    assigned_s: float | None = None
    first_step_s: float | None = None
    planned: bool = True
    # Of the new generation; 0 and "" while there is none.
    generation: int = 0
    cause: Cause | None = None
    reason: str = ""


class ChangeClock:
    """Watches one job. `note` gives each change when it is over."""

    def __init__(self, job: str) -> None:
        self._job = job
        # Since when those who joined are waited for.
        self._settling_s: float | None = None
        self._change: ChangeTimes | None = None

    def note(self, state: JobState, actions: Sequence[Action], wall_s: float) -> list[ChangeTimes]:
        """Take up one decision; the changes that are over with it."""
        over: list[ChangeTimes] = []
        record = state.record
        if record.change is not None and self._change is None:
            self._begin(wall_s, planned=record.change.planned)
        for action in actions:
            if isinstance(action, EndGeneration):
                over += self._given_up()
                change = self._change or self._begin(wall_s, planned=record.change is None or record.change.planned)
                self._change = replace(change, left_s=wall_s)
            elif isinstance(action, BeginGeneration):
                change = self._change or self._begin(wall_s, planned=True)
                number, reason = action.generation.number, action.generation.reason
                self._change = replace(change, assigned_s=wall_s, generation=number, cause=action.cause, reason=reason)
            elif isinstance(action, FirstStep) and self._change is not None:
                over.append(replace(self._change, first_step_s=wall_s))
                self._change = None
        if record.phase.finished or self._is_off(state):
            over += self._given_up()
            self._change = None
        settling = state.live.settle_until_s is not None
        self._settling_s = (self._settling_s or wall_s) if settling else None
        return over

    def _begin(self, wall_s: float, *, planned: bool) -> ChangeTimes:
        self._change = ChangeTimes(self._job, self._settling_s or wall_s, wall_s, planned=planned)
        return self._change

    def _given_up(self) -> list[ChangeTimes]:
        """The generation that has begun, and is over before its first step."""
        change = self._change
        if change is None or change.assigned_s is None:
            return []
        self._change = None
        return [change]

    def _is_off(self, state: JobState) -> bool:
        """The change was planned, and is not wanted any more."""
        change = self._change
        return (
            change is not None and change.left_s is None and change.assigned_s is None and state.record.change is None
        )
