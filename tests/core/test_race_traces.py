"""Golden traces of in-process mode: messages that cross, streams that blip, ends that come at the wrong moment."""

from __future__ import annotations

import pytest
from core import golden
from core.story import Story
from stretto_controller.core import events as ev
from stretto_controller.core.model import JobSpec, Mode, Version

STORIES = golden.Stories()


def _job(min_nodes: int, max_nodes: int) -> Story:
    return Story(JobSpec(min_nodes, max_nodes, Mode.IN_PROCESS, base_batch_size=8, batch_size=8))


def _two_at_step_10(min_nodes: int = 1, max_nodes: int = 2) -> Story:
    s = _job(min_nodes, max_nodes)
    s.lives("n0", "n1")
    s.passes(1.5)
    s.live_steps("n0/0", 10)
    return s


def _says_hello_again(s: Story, session_id: str, rank: int) -> None:
    """A worker in the current generation opens a new stream, under the same name."""
    node_id, local_rank = session_id.split("/")
    hello = ev.WorkerHello(session_id, node_id, int(local_rank), rank, s.current(), JobSpec())
    s.tell(hello, f"worker {session_id} of generation {s.current()} says hello again")


@STORIES.tell
def live_a_lost_assignment_is_given_again_though_the_next_change_is_planned() -> Story:
    s = _two_at_step_10(max_nodes=3)
    s.asks("n0/0", "n1/0", step=11, failed=True)
    lost = s.asked
    s.tell(ev.WorkerStreamClosed("n1/0"), "the stream of worker n1/0 closes before its assignment arrives")
    s.lives("n2")
    s.passes(1)
    s.asked = lost - 1
    s.worker_comes("n1", version=Version(1, 11))
    return s


@STORIES.tell
def live_a_worker_whose_stream_is_away_is_no_loss_while_its_agent_is_well() -> Story:
    s = _two_at_step_10()
    s.tell(ev.WorkerStreamClosed("n1/0"), "the stream of worker n1/0 closes")
    s.passes(20)
    _says_hello_again(s, "n1/0", 1)
    s.passes(1)
    return s


@STORIES.tell
def live_a_worker_s_newer_stream_takes_over_and_what_comes_on_the_older_is_nobodys() -> Story:
    s = _two_at_step_10()
    asked = s.worker_ready(1, step=11, failed=True)
    hello = ev.WorkerHello("n1/0 again", "n1", 0, -1, 0, JobSpec(), asked)
    s.tell(hello, "worker n1/0 opens another stream, and asks there")
    s.tell(ev.WorkerAsked("n1/0", asked), "what it had said on the older one arrives")
    s.tell(ev.WorkerStreamClosed("n1/0"), "the older stream closes")
    s.asks("n0/0", step=11, failed=True)
    return s


@STORIES.tell
def live_who_ends_first_is_no_loss_for_the_others() -> Story:
    s = _two_at_step_10()
    s.tell(ev.WorkerFinished("n0/0", 1, 20, 20.0), "worker n0/0 reached the target")
    s.tell(ev.WorkerStreamClosed("n0/0"), "the stream of worker n0/0 closes")
    s.asks("n1/0", step=20, failed=True)
    s.passes(60)
    s.succeeds("n0")
    return s


@STORIES.tell
def live_a_crash_after_the_target_is_a_failure_only_if_nobody_is_left() -> Story:
    s = _two_at_step_10()
    s.tell(ev.WorkerFinished("n0/0", 1, 20, 20.0), "worker n0/0 reached the target")
    s.ready("n0", failed=True)
    s.ready("n1", failed=True)
    return s


@STORIES.tell
def live_a_siblings_sigterm_is_no_drain() -> Story:
    s = _job(1, 2)
    s.lives("n0", "n1", slots=2)
    s.live_steps("n0/0", 10)
    s.sigterm("n1/0")
    s.tell(ev.WorkerStreamClosed("n1/1"), "the stream of worker n1/1 closes: it had crashed")
    s.asks("n0/0", "n0/1", step=10, failed=True)
    s.tell(ev.WorkerStreamClosed("n1/0"), "the stream of worker n1/0 closes")
    s.ready("n1", failed=True, exit_signal=11)
    for local_rank in range(2):
        s.worker_comes("n1", local_rank)
    return s


@STORIES.tell
def live_a_draining_agent_that_loses_its_stream_is_not_gone_yet() -> Story:
    s = _two_at_step_10()
    s.sigterm("n1/0")
    s.loses_its_stream("n1")
    s.passes(2)
    s.asks("n0/0", "n1/0", step=12)
    s.dies("n1")
    return s


@STORIES.tell
def live_the_last_survivor_saves_when_it_has_to_go() -> Story:
    s = _two_at_step_10(min_nodes=2)
    s.vanishes("n1", "n1/0")
    s.asks("n0/0", step=11, failed=True)
    s.passes(5)
    s.tell(ev.DrainRequested("n0"), "drain n0, says a user")
    s.lives("n2", "n3")
    s.saves("n0/0", 11)
    s.tell(ev.WorkerStreamClosed("n0/0"), "the stream of worker n0/0 closes")
    s.succeeds("n0")
    return s


@STORIES.tell
def live_of_two_that_drain_the_one_with_more_saves() -> Story:
    s = _two_at_step_10()
    s.sigterm("n0/0")
    s.asks("n0/0", step=12)
    s.sigterm("n1/0")
    s.asks("n1/0", step=11, failed=True)
    s.saves("n0/0", 12)
    s.tell(ev.WorkerStreamClosed("n0/0"), "the stream of worker n0/0 closes")
    s.leaves("n0")
    return s


@STORIES.tell
def live_the_late_word_of_an_ended_worker_keeps_none_of_the_next_out() -> Story:
    s = _job(1, 1)
    s.lives("n0")
    s.live_steps("n0/0", 10)
    s.ready("n0", failed=True, exit_signal=15)
    late = ev.WorkerHello("n0/0 late", "n0", 0, 0, 1, JobSpec())
    s.tell(late, "a hello of the worker that has ended arrives")
    s.tell(ev.WorkerDraining("n0/0 late", 1), "so does its word that it had SIGTERM")
    s.worker_comes("n0")
    s.passes(1)
    return s


@STORIES.tell
def live_who_is_late_is_left_behind_and_joins_when_it_asks() -> Story:
    s = _job(1, 3)
    s.lives("n0", "n1", "n2")
    s.live_steps("n0/0", 10)
    s.vanishes("n2", "n2/0")
    s.asks("n0/0", step=11, failed=True)
    s.passes(11)
    s.live_steps("n0/0", 12)
    late = s.worker_ready(1, step=11, failed=True)
    s.tell(ev.WorkerAsked("n1/0", late), "worker n1/0 has evaluated, and finds generation 1 broken")
    s.passes(1)
    return s


@STORIES.tell
def live_the_controller_is_killed_while_survivors_wait() -> Story:
    s = _two_at_step_10(min_nodes=2)
    s.vanishes("n1", "n1/0")
    s.asks("n0/0", step=11, failed=True)
    s.crashes_and_recovers()
    s.hello("n0")
    s.worker_comes("n0", version=Version(1, 11))
    s.passes(20)
    s.lives("n2")
    return s


@STORIES.tell
def live_who_hangs_is_kept_out_until_its_agent_has_ended_it() -> Story:
    s = _two_at_step_10()
    s.hangs("n1/0")
    s.passes(3)
    s.asks("n0/0", step=10, failed=True)
    s.worker_comes("n1", version=Version(1, 10))
    s.loses_its_stream("n1")
    s.hello("n1")
    s.ready("n1")
    s.hung.clear()
    s.worker_comes("n1")
    return s


@STORIES.tell
def live_who_holds_the_state_goes_on_when_fewer_are_wanted() -> Story:
    s = _two_at_step_10()
    s.tell(ev.PauseRequested(), "pause, says a user")
    s.asks("n0/0", "n1/0", step=12)
    s.ready("n0", failed=True, exit_signal=9)
    s.worker_comes("n0")
    s.tell(ev.ScaleRequested(1), "one node, says a user")
    s.tell(ev.ResumeRequested(), "resume, says a user")
    return s


@pytest.mark.parametrize("name", STORIES.names)
def test_story_is_told_as_before(name: str) -> None:
    STORIES.check(name)
