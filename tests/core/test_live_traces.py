"""Golden traces of in-process mode: live workers change generation. Rewritten as those of restart mode are."""

from __future__ import annotations

import pytest
from core import golden
from core.story import Story
from stretto_controller.core import actions as ac
from stretto_controller.core import events as ev
from stretto_controller.core.model import JobSpec, Mode, Version

STORIES = golden.Stories()


def _job(min_nodes: int, max_nodes: int) -> Story:
    return Story(JobSpec(min_nodes, max_nodes, Mode.IN_PROCESS, base_batch_size=8, batch_size=8))


def _three_at_step_10() -> Story:
    s = _job(1, 3)
    s.lives("n0", "n1", "n2")
    s.live_steps("n0/0", 10)
    return s


@STORIES.tell
def live_a_node_is_killed_and_survivors_go_on() -> Story:
    s = _three_at_step_10()
    s.passes(1)
    s.vanishes("n2", "n2/0")
    s.asks("n0/0", step=10, failed=True)
    s.asks("n1/0", step=11, failed=True)
    s.live_steps("n1/0", 12)
    return s


@STORIES.tell
def live_a_job_that_shrinks_to_its_minimum_is_saved() -> Story:
    """One loss more, and nobody may hold the state; whoever asks for a checkpoint meanwhile gets another."""
    s = _job(2, 3)
    s.lives("n0", "n1", "n2")
    s.live_steps("n0/0", 10)
    s.vanishes("n2", "n2/0")
    s.asks("n0/0", "n1/0", step=10, failed=True)
    s.live_steps("n0/0", 11)
    s.saves("n0/0", 11)
    s.tell(ev.CheckpointRequested(), "somebody asks for a checkpoint")
    s.tell(ev.CheckpointFailed("n0/0", 2, 12, "no space left"), "n0/0 cannot save step 12")
    return s


@STORIES.tell
def live_a_newcomer_is_given_the_state() -> Story:
    s = _job(1, 3)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    s.lives("n2")
    s.asks("n0/0", "n1/0", step=12)
    s.live_steps("n0/0", 13)
    return s


@STORIES.tell
def live_a_killed_worker_comes_back_under_its_agent() -> Story:
    s = _three_at_step_10()
    s.ready("n1", failed=True, exit_signal=9)
    s.asks("n0/0", "n2/0", step=10, failed=True)
    s.worker_comes("n1")
    s.asks("n0/0", "n2/0", step=14)
    return s


@STORIES.tell
def live_a_hung_worker_is_killed_by_its_agent() -> Story:
    s = _three_at_step_10()
    s.hangs("n1/0")
    s.passes(3.5)
    s.asks("n0/0", "n2/0", step=10, failed=True)
    return s


@STORIES.tell
def live_a_slow_worker_is_named_before_anything_is_cut() -> Story:
    s = _three_at_step_10()
    for waited_s in (0.4, 1.4, 2.4):
        s.passes(0.5)
        s.paces("n0/0", step=12, waiting_s=waited_s)
        s.paces("n1/0", step=12, waiting_s=waited_s)
        s.passes(0.3)
        s.paces("n2/0", step=12, working_s=waited_s + 0.3)
        s.passes(0.2)
    s.live_steps("n0/0", 12)
    s.passes(1)
    return s


@STORIES.tell
def live_who_does_not_answer_the_cut_is_lost() -> Story:
    s = _three_at_step_10()
    s.passes(0.9)
    s.hangs("n2/0")
    s.passes(0.1)
    s.asks("n0/0", step=10, failed=True)
    s.passes(0.2)
    s.asks("n1/0", step=10, failed=True)
    s.passes(0.2)
    return s


@STORIES.tell
def live_a_roll_call_that_the_controller_itself_held_up_ends_nobody() -> Story:
    s = _three_at_step_10()
    s.passes(1)
    s.asks("n0/0", step=10, failed=True)
    s.is_held_up(0.5)
    s.asks("n1/0", step=10, failed=True)
    s.asks("n2/0", step=10, failed=True)
    return s


@STORIES.tell
def live_who_is_silent_for_long_after_a_roll_call_that_was_held_up_is_lost() -> Story:
    s = _three_at_step_10()
    s.passes(0.9)
    s.hangs("n2/0")
    s.passes(0.1)
    s.asks("n0/0", step=10, failed=True)
    s.is_held_up(0.5)
    s.asks("n1/0", step=10, failed=True)
    s.passes(4)
    return s


@STORIES.tell
def live_a_stale_state_is_never_given_to_others() -> Story:
    s = _three_at_step_10()
    s.vanishes("n2", "n2/0")
    s.asks("n0/0", "n1/0", step=10, failed=True)
    s.live_steps("n0/0", 11)
    s.lives("n2", generation=1, step=500)
    s.asks("n0/0", "n1/0", step=12)
    s.vanishes("n0", "n0/0")
    s.vanishes("n1", "n1/0")
    s.tell(ev.WorkerStreamClosed("n2/0"), "the stream of worker n2/0 closes")
    s.worker_comes("n2", version=Version(1, 500))
    s.passes(16)
    return s


@STORIES.tell
def live_below_min_nodes_survivors_keep_the_state() -> Story:
    s = _job(2, 3)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    s.vanishes("n1", "n1/0")
    s.asks("n0/0", step=10, failed=True)
    s.passes(30)
    s.lives("n3")
    return s


@STORIES.tell
def live_survivors_give_up_saved_when_nobody_comes() -> Story:
    s = _job(2, 3)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    s.vanishes("n1", "n1/0")
    s.asks("n0/0", step=10, failed=True)
    s.passes(700)
    return s


@STORIES.tell
def live_a_pause_is_saved_and_resumed_from_memory() -> Story:
    s = _three_at_step_10()
    s.tell(ev.PauseRequested(), "pause, says a user")
    s.saves("n0/0", 12)
    s.asks("n0/0", "n1/0", "n2/0", step=12)
    s.passes(30)
    s.tell(ev.ResumeRequested(), "resume, says a user")
    return s


@STORIES.tell
def live_the_last_node_saves_before_it_drains() -> Story:
    s = _three_at_step_10()
    s.sigterm("n2/0")
    s.asks("n0/0", "n1/0", "n2/0", step=12)
    s.sigterm("n0/0")
    s.sigterm("n1/0")
    s.saves("n0/0", 14)
    s.asks("n0/0", "n1/0", step=14)
    return s


@STORIES.tell
def live_peers_that_cannot_reach_each_other_are_kept_apart() -> Story:
    s = _three_at_step_10()
    s.asks("n0/0", step=10, failed=True, unreachable=(2,))
    s.asks("n1/0", step=10, failed=True, unreachable=(2,))
    s.asks("n2/0", step=10, failed=True, unreachable=(0, 1))
    return s


@STORIES.tell
def live_a_broken_network_is_tried_less_and_less_often() -> Story:
    """Each attempt costs those who train a pause."""
    s = _three_at_step_10()
    s.asks("n0/0", "n1/0", step=10, failed=True, unreachable=(2,))
    s.asks("n2/0", step=10, failed=True, unreachable=(0, 1))
    s.live_steps("n0/0", 20)
    s.passes(15.5)
    s.asks("n0/0", "n1/0", step=30)
    s.asks("n0/0", "n1/0", step=30, failed=True, unreachable=(2,))
    s.asks("n2/0", step=10, failed=True, unreachable=(0, 1))
    s.live_steps("n0/0", 40)
    s.passes(29)
    s.live_steps("n0/0", 50)
    s.passes(1.5)
    return s


@STORIES.tell
def live_a_deaf_controller_blames_nobody() -> Story:
    """Its network swallows all that is said: no stream closes, and nobody is heard."""
    s = _three_at_step_10()
    for node_id in ("n0", "n1", "n2"):
        s.freezes(node_id)
        s.hangs(f"{node_id}/0")
    s.passes(12)
    s.live_steps("n0/0", 20)
    return s


@STORIES.tell
def live_two_of_three_nodes_lose_power() -> Story:
    """Their silence alone could be the controller's deafness; the third has lost its peers."""
    s = _three_at_step_10()
    for node_id in ("n1", "n2"):
        s.freezes(node_id)
        s.hangs(f"{node_id}/0")
    s.passes(5)
    s.asks("n0/0", step=10, failed=True, unreachable=(1, 2))
    s.passes(1)
    return s


@STORIES.tell
def live_the_controller_is_killed_before_an_assignment_is_sent() -> Story:
    s = _three_at_step_10()
    s.crashes_and_recovers(after_s=0.5)
    for node_id in ("n0", "n1", "n2"):
        s.hello(node_id)
    s.asked = 0
    for node_id in ("n0", "n1", "n2"):
        s.worker_comes(node_id)
    s.passes(2)
    return s


@pytest.mark.parametrize("name", STORIES.names)
def test_story_is_told_as_before(name: str) -> None:
    STORIES.check(name)


def test_the_end_is_noted_in_the_workers_own_generation_whatever_its_message_says() -> None:
    s = _three_at_step_10()
    (reached, *_) = s.tell(ev.WorkerFinished("n0/0", 999, 12, 3.0), "n0/0 has finished, in a generation that never was")
    assert reached == ac.ReachTarget(1, 12, 3.0)
