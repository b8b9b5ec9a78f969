"""Asking for checkpoints, and what is heard of them."""

from __future__ import annotations

import pytest
from core.story import Story
from stretto_controller.core import events as ev
from stretto_controller.core.actions import AskToSave, LogEvent
from stretto_controller.core.errors import Rejected
from stretto_controller.core.job import step
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, Mode
from stretto_controller.core.report import Checkpoint


def _job(min_nodes: int, *nodes: str) -> Story:
    s = Story(JobSpec(min_nodes, 3, Mode.IN_PROCESS, base_batch_size=8, batch_size=8))
    s.lives(*nodes)
    s.passes(2)
    s.live_steps("n0/0", 10)
    return s


def _asked(actions: tuple[object, ...]) -> list[str]:
    return [action.session_id for action in actions if isinstance(action, AskToSave)]


def test_rank_0_is_asked_to_save() -> None:
    s = _job(1, "n0", "n1")
    assert _asked(s.tell(ev.CheckpointRequested(), "asked")) == ["n0/0"]


def _told(actions: tuple[object, ...]) -> list[str]:
    return [action.kind for action in actions if isinstance(action, LogEvent)]


def test_a_checkpoint_is_news_once_per_generation_or_when_it_was_asked_for() -> None:
    s = _job(1, "n0", "n1")

    def saves(at: int) -> list[str]:
        return _told(
            s.tell(ev.CheckpointCommitted("n0/0", Checkpoint(s.current(), at, 1.5 * at, f"step-{at}")), "saved")
        )

    assert saves(10) == ["checkpoint_committed"]
    assert saves(20) == saves(30) == [], "every few seconds, for hours"
    s.tell(ev.CheckpointRequested(), "asked")
    assert saves(40) == ["checkpoint_committed"]
    assert saves(50) == []


def test_a_job_without_workers_cannot_be_saved() -> None:
    s = Story(JobSpec(2, 3, Mode.IN_PROCESS, base_batch_size=8, batch_size=8))
    s.lives("n0")
    assert s.state is not None
    with pytest.raises(Rejected, match="no worker can save now"):
        step("job", s.state, ev.CheckpointRequested(), now_s=1.0, limits=Limits())


def test_failed_saves_are_told_only_by_the_current_generation() -> None:
    s = _job(1, "n0", "n1")
    told = s.tell(ev.CheckpointFailed("n0/0", s.current(), 12, "no space left"), "failed")
    assert "no checkpoint of step 12: no space left" in repr(told)
    assert s.tell(ev.CheckpointFailed("n0/0", 99, 12, "no space left"), "failed, of another generation") == ()
