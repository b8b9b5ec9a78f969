"""Golden traces: stories of the restart mode, told by the real core. STRETTO_REWRITE_TRACES=1 rewrites them."""

from __future__ import annotations

import pytest
from core import golden, test_live_traces, test_race_traces, test_return_traces
from core.story import Story
from stretto_controller.core import events as ev
from stretto_controller.core.model import JobSpec, Mode

STORIES = golden.Stories()


@STORIES.tell
def three_nodes_start_together() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0")
    s.passes(0.4)
    s.joins("n1", "n2")
    return s


@STORIES.tell
def fewer_than_max_start_after_the_settle_time() -> Story:
    s = Story(JobSpec(1, 4, Mode.RESTART))
    s.joins("n0")
    s.passes(0.6)
    s.joins("n1")
    s.passes(1.5)
    return s


@STORIES.tell
def a_killed_node_is_replaced_by_a_spare() -> Story:
    s = Story(JobSpec(2, 2, Mode.RESTART))
    s.joins("n0", "n1", "spare")
    s.passes(5)
    s.dies("n1")
    s.passes(0.1)
    s.ready("n0", failed=True)
    return s


@STORIES.tell
def a_killed_worker_restarts_everyone_and_nobody_is_lost() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1", "n2")
    s.passes(5)
    s.ready("n1", failed=True, exit_signal=9)
    s.passes(0.1)
    s.ready("n0", "n2", failed=True)
    return s


@STORIES.tell
def the_first_agent_is_not_special() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1", "n2")
    s.passes(5)
    s.dies("n0")
    s.ready("n1", "n2", failed=True)
    s.passes(3)
    s.joins("n0b")
    s.passes(0.1)
    s.ready("n1", "n2")
    return s


@STORIES.tell
def a_newcomer_waits_for_a_step_boundary() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1")
    s.passes(2)
    s.worker("n0", 0, spec=JobSpec(base_batch_size=16, batch_size=16, target_tau=100))
    s.worker("n1", 1)
    s.steps(0, 10, tau=15)
    s.joins("n2")
    s.passes(0.2)
    s.checkpointed(0, 12)
    s.worker_left(0, 12)
    s.worker_left(1, 12)
    s.ready("n0", "n1")
    s.worker("n0", 0)
    s.steps(0, 1, tau=18)
    return s


@STORIES.tell
def a_node_drains_and_goes_home() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1", "n2")
    for rank in range(3):
        s.worker(f"n{rank}", rank)
    s.tell(ev.WorkerDraining("w1.1", 1), "worker 1 had SIGTERM")
    for rank in range(3):
        s.worker_left(rank, 7)
    s.dies("n1")
    s.ready("n0", "n2")
    return s


@STORIES.tell
def a_crashed_worker_whose_siblings_are_stopped_is_no_drain() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1", slots=2)
    s.worker("n0", 0)
    s.worker("n1", 3)
    s.tell(ev.WorkerDraining("w3.1", 1), "worker 3 had SIGTERM: its sibling crashed")
    s.ready("n1", failed=True, exit_signal=9)
    s.tell(ev.WorkerDraining("w0.1", 1), "worker 0 had SIGTERM: its agent stops it")
    s.ready("n0")
    return s


@STORIES.tell
def a_hung_node_is_lost_after_three_heartbeats() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1")
    s.passes(1)
    s.freezes("n1")
    s.passes(3.2)
    s.ready("n0")
    return s


@STORIES.tell
def a_stopped_controller_blames_nobody_when_it_goes_on() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1")
    s.passes(2)
    s.lines.append(f"{s.now_s:7.2f}  the controller is stopped for 60 s")
    s.now_s += 60
    s.joins("n2")
    s.passes(1)
    return s


@STORIES.tell
def steps_vouch_for_a_node_whose_stream_is_gone() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1")
    s.worker("n0", 0)
    s.worker("n1", 1)
    s.steps(0, 1)
    lost = s.agents["n1"]
    s.dies("n1")
    for number in range(2, 8):
        s.passes(1)
        s.steps(0, number)
    s.agents["n1"] = lost
    s.hello("n1")
    s.passes(5)
    return s


@STORIES.tell
def the_controller_is_killed_and_training_does_not_notice() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1")
    s.passes(5)
    s.crashes_and_recovers()
    s.hello("n0")
    s.hello("n1")
    s.passes(20)
    return s


@STORIES.tell
def a_node_dies_while_the_controller_is_down() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1")
    s.passes(5)
    s.agents.pop("n1")
    s.crashes_and_recovers()
    agent = s.agents["n0"]
    s.hello("n0", ready=agent.ready(failed=True))
    s.passes(3)
    return s


@STORIES.tell
def an_assignment_lost_with_the_controller_is_given_again() -> Story:
    s = Story(JobSpec(2, 2, Mode.RESTART))
    s.hello("n0")
    request = s.agents["n0"].ready()
    s.tell(ev.NodeReady("n0", "s1", request), "n0 is ready")
    s.joins("n1")
    s.agents["n0"].generation = 0
    s.crashes_and_recovers(after_s=0.3)
    s.hello("n0", ready=request)
    s.hello("n1")
    s.passes(4)
    return s


@STORIES.tell
def a_job_pauses_and_goes_on() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1")
    s.tell(ev.PauseRequested(), "pause, says a user")
    s.ready("n0", "n1")
    s.passes(10)
    s.tell(ev.ResumeRequested(), "resume, says a user")
    return s


@STORIES.tell
def a_job_is_scaled_down_and_up() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1", "n2")
    s.tell(ev.ScaleRequested(2), "scale to 2, says a user")
    s.ready("n0", "n1", "n2")
    s.tell(ev.ScaleRequested(3), "scale to 3, says a user")
    s.ready("n0", "n1")
    s.tell(ev.ScaleRequested(4), "scale to 4, says a user")
    return s


@STORIES.tell
def a_job_ends_well_and_its_name_is_used_again() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1", "n2")
    s.succeeds("n0")
    s.loses_its_stream("n1")
    s.hello("n1")
    s.succeeds("n1")
    s.hello("n2")
    s.retold(max_nodes=1)
    s.joins("other")
    return s


@STORIES.tell
def workers_that_always_fail_end_the_job() -> Story:
    s = Story(JobSpec(1, 2, Mode.RESTART))
    s.joins("n0", "n1")
    s.ready("n0", "n1", failed=True, restarts_left=0)
    return s


@STORIES.tell
def others_deaths_do_not_count_as_a_nodes_own_failure() -> Story:
    s = Story(JobSpec(1, 3, Mode.RESTART))
    s.joins("n0", "n1", "n2")
    s.passes(3)
    s.dies("n2")
    s.ready("n0", "n1", failed=True, restarts_left=0)
    s.passes(3)
    s.ready("n1", failed=True, exit_signal=11, restarts_left=0)
    s.ready("n0", failed=True, restarts_left=0)
    return s


@STORIES.tell
def below_min_nodes_the_job_waits() -> Story:
    s = Story(JobSpec(2, 3, Mode.RESTART))
    s.joins("n0", "n1")
    s.passes(2)
    s.dies("n1")
    s.ready("n0", failed=True)
    s.passes(60)
    s.joins("n3")
    s.passes(2)
    return s


@STORIES.tell
def bad_requests_change_nothing() -> Story:
    s = Story(JobSpec(3, 2, Mode.RESTART))
    s.tell(ev.ScaleRequested(2), "scale an unknown job")
    s.hello("n0")
    s.retold(min_nodes=1)
    s.joins("n0", "n1")
    s.hello("n0", key="stolen")
    s.retold(max_nodes=5)
    s.hello("n2")
    s.retold(max_nodes=2, mode=Mode.IN_PROCESS)
    s.hello("n2")
    s.retold(mode=Mode.RESTART)
    s.hello("n2", slots=0)
    s.tell(ev.ScaleRequested(9), "scale beyond max")
    s.tell(ev.DrainRequested("nobody"), "drain an unknown node")
    return s


@pytest.mark.parametrize("name", STORIES.names)
def test_story_is_told_as_before(name: str) -> None:
    STORIES.check(name)


def test_every_trace_has_its_story() -> None:
    told = [
        *STORIES.names,
        *test_live_traces.STORIES.names,
        *test_race_traces.STORIES.names,
        *test_return_traces.STORIES.names,
    ]
    assert {path.stem for path in golden.TRACES.glob("*.txt")} == set(told)
