"""Golden traces of in-process mode: who comes back by halves, misses a word, or never answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core import golden
from core.story import LIMITS, Story
from stretto_controller.core import events as ev
from stretto_controller.core.model import JobSpec, Mode, Version, WorkerReady
from stretto_controller.core.report import Progress

STORIES = golden.Stories()


def _job(min_nodes: int, max_nodes: int) -> Story:
    spec = JobSpec(min_nodes, max_nodes, Mode.IN_PROCESS, base_batch_size=8, batch_size=8)
    return Story(spec, replace(LIMITS, hang_limit_s=20.0, end_limit_s=30.0))


def _two_at_step_10(min_nodes: int = 1, max_nodes: int = 2) -> Story:
    s = _job(min_nodes, max_nodes)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    return s


def _comes_back_by_halves() -> Story:
    """A node with two workers was out of sight; one of them is back, and a node without any state waits, too."""
    s = _job(1, 2)
    s.lives("n0", slots=2)
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    s.vanishes("n0", "n0/0", "n0/1")
    s.passes(5)
    s.hello("n0", slots=2)
    s.worker_comes("n0", 0, version=Version(1, 12))
    s.lives("n1")
    s.passes(3)
    return s


@STORIES.tell
def live_who_holds_the_state_and_comes_back_by_halves_is_waited_for() -> Story:
    s = _comes_back_by_halves()
    s.worker_comes("n0", 1, version=Version(1, 12))
    return s


@STORIES.tell
def live_the_other_half_that_never_comes_is_not_waited_for_for_ever() -> Story:
    s = _comes_back_by_halves()
    s.passes(10)
    return s


@STORIES.tell
def live_a_dismissed_agent_that_missed_the_word_is_told_again() -> Story:
    s = _two_at_step_10()
    s.tell(ev.DrainRequested("n1"), "drain n1, says a user")
    s.asks("n0/0", "n1/0", step=12)
    s.tell(ev.StreamClosed("n1", s.agents["n1"].session_id), "the stream of n1 closes before it hears of it")
    s.hello("n1")
    s.hello("n1", key="another agent")
    return s


@STORIES.tell
def live_who_was_sent_home_does_not_begin_the_finished_job_anew() -> Story:
    """The word was lost; when it comes back the others have reached the target, and then the name is used again."""
    s = _two_at_step_10()
    s.tell(ev.DrainRequested("n1"), "drain n1, says a user")
    s.asks("n0/0", "n1/0", step=12)
    s.tell(ev.StreamClosed("n1", s.agents["n1"].session_id), "the stream of n1 closes before it hears of it")
    s.tell(ev.WorkerFinished("n0/0", 2, 20, 20.0), "worker n0/0 reached the target")
    s.succeeds("n0")
    s.hello("n1")
    s.hello("n2")
    s.hello("n1")
    s.hello("n0")
    return s


@STORIES.tell
def live_a_pause_that_meets_a_failure_is_saved_first() -> Story:
    s = _two_at_step_10()
    s.asks("n0/0", step=10, failed=True)
    s.tell(ev.PauseRequested(), "pause, says a user")
    s.asks("n1/0", step=11, failed=True)
    s.passes(0.5)
    s.saves("n1/0", 12)
    s.asks("n0/0", "n1/0", step=12)
    return s


@STORIES.tell
def live_who_was_fenced_and_never_asks_is_ended() -> Story:
    """It speaks; but its training thread hangs, and a job that needs it would wait for ever."""
    s = _two_at_step_10(min_nodes=2)
    s.vanishes("n1", "n1/0")
    s.asks("n0/0", step=10, failed=True)
    s.passes(5)
    s.hello("n1")
    s.tell(ev.WorkerHello("n1/0", "n1", 0, 1, 1, JobSpec()), "worker n1/0 of generation 1 says hello again")
    s.passes(25)
    return s


@STORIES.tell
def live_who_waits_and_falls_silent_is_ended() -> Story:
    s = _job(2, 2)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    s.lives("n2")
    s.hangs("n2/0")
    s.passes(25)
    return s


@STORIES.tell
def live_who_hangs_after_the_target_does_not_keep_the_job_from_its_end() -> Story:
    s = _two_at_step_10()
    s.tell(ev.WorkerFinished("n0/0", 1, 20, 20.0), "worker n0/0 reached the target")
    s.succeeds("n0")
    s.passes(35)
    return s


@STORIES.tell
def live_a_lone_worker_that_stays_away_is_ended() -> Story:
    """Its process is stopped, and its stream ended with the controller's restart; its agent sees nothing wrong."""
    s = _job(1, 1)
    s.lives("n0")
    s.live_steps("n0/0", 10)
    s.crashes_and_recovers()
    s.hello("n0")
    s.passes(30)
    return s


@STORIES.tell
def live_workers_that_hang_over_a_restart_are_ended_though_nobody_awaits_them() -> Story:
    """They had spoken to the controller before it was started again, so they do not load (seed 102299)."""
    s = _two_at_step_10(min_nodes=2)
    s.hangs("n1/0")
    s.asks("n0/0", step=10, failed=True)
    s.hangs("n0/0")
    s.crashes_and_recovers()
    s.hello("n0")
    s.hello("n1")
    s.passes(25)
    s.ready("n1", failed=True, exit_signal=9)
    s.worker_comes("n1")
    return s


@STORIES.tell
def live_a_process_that_never_spoke_may_load_for_long() -> Story:
    s = _job(2, 2)
    s.hello("n0")
    s.ready("n0")
    s.crashes_and_recovers()
    s.hello("n0")
    s.passes(60)
    return s


@STORIES.tell
def live_a_repeated_question_is_a_new_one_if_its_generation_ends_with_it() -> Story:
    """The answer to it was lost; with the repetition the other member's time is up (seed 4942)."""
    s = _job(1, 2)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.vanishes("n1", "n1/0")
    s.now_s += 30
    s.tell(
        ev.WorkerHello("n0/0 again", "n0", 0, -1, 0, JobSpec(), WorkerReady(1, 0, Version())),
        "worker n0/0 comes back, and asks the same again",
    )
    s.passes(2)
    return s


@STORIES.tell
def live_who_has_less_than_was_saved_goes_on_from_the_checkpoint() -> Story:
    """Only n1 had done step 12; it is gone, and its checkpoint is there (seed 5394)."""
    s = _two_at_step_10()
    s.sigterm("n1/0")
    s.asks("n1/0", step=12, failed=True)
    s.passes(10.5)
    s.saves("n1/0", 12)
    s.vanishes("n1", "n1/0")
    s.asks("n0/0", step=11, failed=True)
    s.passes(3)
    return s


@STORIES.tell
def live_of_two_that_cannot_reach_each_other_the_one_with_the_state_stays() -> Story:
    """n0 came first; but it has never had the state."""
    s = _two_at_step_10()
    s.asks("n0/0", step=0, failed=True, unreachable=(1,))
    s.asks("n1/0", step=10, failed=True, unreachable=(0,))
    return s


@STORIES.tell
def live_who_drains_says_what_it_holds_before_others_begin_without_it() -> Story:
    s = _two_at_step_10(max_nodes=3)
    s.sigterm("n1/0")
    s.lives("n2")
    s.ready("n0", failed=True, exit_signal=9)
    s.passes(0.2)
    s.asks("n1/0", step=11, failed=True)
    s.saves("n1/0", 11)
    s.tell(ev.WorkerStreamClosed("n1/0"), "the stream of worker n1/0 closes")
    return s


@STORIES.tell
def live_two_join_at_once() -> Story:
    s = _two_at_step_10(max_nodes=4)
    s.lives("n2", "n3")
    s.asks("n0/0", "n1/0", step=12)
    return s


def test_a_generation_that_begins_with_a_checkpoint_begins_at_its_tau() -> None:
    s = _two_at_step_10()
    s.saves("n0/0", 10)
    s.tell(ev.WorkerProgressed("n0/0", Progress(1, 25, tau=25.0)), "n0/0 is at step 25")
    s.vanishes("n0", "n0/0")
    s.vanishes("n1", "n1/0")
    s.passes(20)
    s.lives("n2", "n3")
    assert s.state is not None
    assert s.state.record.generation is not None
    assert s.state.record.generation.first_tau == 10.0, "what came after it is done again"


@pytest.mark.parametrize("name", STORIES.names)
def test_story_is_told_as_before(name: str) -> None:
    STORIES.check(name)
