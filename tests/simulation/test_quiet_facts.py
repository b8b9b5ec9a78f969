"""A shortcut of the core held against the long way: where it says that nothing follows from a fact, nothing does."""

from __future__ import annotations

from collections import Counter

import pytest
from simulation.world import run
from stretto_controller.core import job, quiet
from stretto_controller.core.draft import Draft
from stretto_controller.core.events import Event
from stretto_controller.core.model import JobState
from stretto_controller.core.reconsider import reconsider

SCHEDULES = 300


def test_what_is_not_reconsidered_would_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[str] = Counter()
    wrong: list[str] = []

    def checked(draft: Draft, before: JobState, event: Event) -> bool:
        says = quiet_before(draft, before, event)
        wake_s = job.next_wake_s(JobState(draft.record, draft.live), draft.limits)
        # What time alone brings is for the next wake-up, which is planned.
        if says and (wake_s is None or wake_s > draft.now_s):
            taken[type(event).__name__] += 1
            twin = Draft(JobState(draft.record, draft.live), draft.now_s, draft.limits)
            reconsider(twin)
            if twin.record is not draft.record or twin.actions or twin.live != draft.live:
                wrong.append(f"{event} in {draft.record.phase}: {twin.actions}")
        return says

    quiet_before = quiet.changes_nothing_yet
    monkeypatch.setattr(quiet, "changes_nothing_yet", checked)
    for seed in range(SCHEDULES):
        run(seed)
        assert not wrong, f"seed {seed}: {wrong[0]}"
    assert taken["WorkerAsked"] > SCHEDULES // 10, taken
