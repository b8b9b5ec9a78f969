"""How a job's size is chosen: what a person may set."""

from __future__ import annotations

import pytest
from stretto_controller.core import events as ev
from stretto_controller.core.actions import LogEvent
from stretto_controller.core.errors import Rejected
from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleChange, AutoscaleMode, Goal
from stretto_controller.core.job import step
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, JobState, Mode

LIMITS = Limits()


def created(change: AutoscaleChange | None = None) -> JobState:
    event = ev.JobCreated(JobSpec(1, 8, Mode.IN_PROCESS), autoscale=change or AutoscaleChange())
    return step("job", None, event, now_s=0.0, limits=LIMITS).state


def test_a_new_job_has_sizes_recommended_and_nothing_is_done() -> None:
    assert created().record.autoscale == Autoscale(AutoscaleMode.RECOMMEND, Goal.PROGRESS, 0.5, 0.0, 1.0, 0)


def test_what_is_not_said_stays_as_it_is() -> None:
    state = created(AutoscaleChange(mode=AutoscaleMode.ACT, efficiency_floor=0.3, priority=2))
    event = ev.AutoscaleRequested(AutoscaleChange(weight=3.0))
    decision = step("job", state, event, now_s=1.0, limits=LIMITS)
    assert decision.state.record.autoscale == Autoscale(AutoscaleMode.ACT, Goal.PROGRESS, 0.3, 0.0, 3.0, 2)
    lines = [action for action in decision.actions if isinstance(action, LogEvent)]
    assert [line.kind for line in lines] == ["autoscale_set"]
    assert "mode act" in lines[0].reason
    assert "weight 3" in lines[0].reason
    again = step("job", decision.state, event, now_s=2.0, limits=LIMITS)
    assert again.state.record is decision.state.record, "the same wish changes nothing durable"


def test_a_deadline_brings_its_goal() -> None:
    state = created()
    decision = step("job", state, ev.AutoscaleRequested(AutoscaleChange(deadline_s=2e9)), now_s=1.0, limits=LIMITS)
    assert decision.state.record.autoscale.goal is Goal.DEADLINE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (AutoscaleChange(efficiency_floor=1.5), "efficiency_floor is 1.5"),
        (AutoscaleChange(weight=-1.0), "weight is -1.0"),
        (AutoscaleChange(goal=Goal.DEADLINE), "no deadline is known"),
        (AutoscaleChange(goal=Goal.COST, deadline_s=2e9), "needs the goal deadline"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(change: AutoscaleChange, words: str) -> None:
    with pytest.raises(Rejected, match=words):
        step("job", created(), ev.AutoscaleRequested(change), now_s=1.0, limits=LIMITS)
