"""The edge: what the messages may say, what an error tells, and that nothing is lost on the way."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stretto_controller.core import actions as act
from stretto_controller.core import events as ev
from stretto_controller.core.errors import Refusal, Rejected
from stretto_controller.core.model import Generation, JobSpec, Member, Mode, Ready, Seat, Version, WorkerReady
from stretto_controller.core.report import Checkpoint, Histogram, Pace, Progress
from stretto_controller.sessions import StreamAction
from stretto_controller.wire import inbound, outbound
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

KEY = "a secret of sufficient length"


def node_hello(**changes: Any) -> rendezvous.AttendRequest:
    values = {
        "protocol_version": 1,
        "job": "mnist",
        "node_id": "node-1.cluster",
        "node_key": KEY,
        "slots": 2,
        "address": "fe80::1%eth0",
        "spec": types.JobSpec(min_nodes=1, max_nodes=4, mode=types.RECONFIGURE_MODE_RESTART),
        **changes,
    }
    return rendezvous.AttendRequest(hello=rendezvous.NodeHello(**values))


def worker_hello(**changes: Any) -> training.TrainRequest:
    values = {"protocol_version": 1, "job": "mnist", "node_id": "n0", "generation": 3, **changes}
    return training.TrainRequest(hello=training.WorkerHello(**values))


def progress(**changes: Any) -> training.TrainRequest:
    return training.TrainRequest(progress=types.Progress(**{"generation": 1, **changes}))


def test_a_node_s_hello_becomes_an_event_with_the_key_hashed() -> None:
    ready = rendezvous.NodeReady(request_id=7, restarts_left=-1, master_port=29500)
    job, event = inbound.node_hello(node_hello(generation=5, ready=ready), "session")
    assert job == "mnist"
    assert event == ev.NodeHello(
        node_id="node-1.cluster",
        key_hash=hashlib.sha256(KEY.encode()).hexdigest(),
        session_id="session",
        slots=2,
        address="fe80::1%eth0",
        spec=JobSpec(min_nodes=1, max_nodes=4, mode=Mode.RESTART),
        generation=5,
        ready=Ready(7, restarts_left=-1, master_port=29500),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": ""}, "job is ''"),
        ({"job": "Mnist"}, "job is 'Mnist'; a job's name is a DNS label"),
        ({"job": "a" * 64}, "DNS label"),
        ({"job": "a\n"}, r"job is 'a\\n'"),
        ({"job": "x" * 5000}, r"\.\.\. \(5000 characters\)"),
        ({"node_id": "n_0"}, "node_id is 'n_0'"),
        ({"node_id": "a..b"}, "node_id"),
        ({"node_id": ".".join(["abcdefgh"] * 40)}, "at most 253"),
        ({"node_key": "short"}, "node_key has 5 characters; it must have 16 to 256"),
        ({"slots": 0}, "slots is 0; it must be a whole number of at least 1"),
        ({"slots": -1}, "slots is -1"),
        ({"address": ""}, "address is ''"),
        ({"address": "host name"}, "address is 'host name'"),
        ({"generation": -1}, "generation is -1"),
        ({"spec": types.JobSpec(min_nodes=3, max_nodes=2)}, "min_nodes is 3 and max_nodes is 2"),
        ({"spec": types.JobSpec(min_nodes=-1)}, "min_nodes is -1"),
        ({"spec": types.JobSpec(target_tau=math.nan)}, "target_tau is nan; it must be a finite number"),
        ({"spec": types.JobSpec(target_tau=math.inf)}, "target_tau is inf"),
        ({"spec": types.JobSpec(mode=17)}, "mode is 17; known are"),  # type: ignore[arg-type]  # a newer peer's
        ({"spec": types.JobSpec(min_nodes=1, max_nodes=1, batch_size=8)}, "without base_batch_size"),
        ({"ready": rendezvous.NodeReady()}, "request_id is 0"),
        ({"ready": rendezvous.NodeReady(request_id=1, restarts_left=-2)}, "restarts_left is -2"),
        ({"ready": rendezvous.NodeReady(request_id=1, store_port=70000)}, "store_port is 70000"),
    ],
)
def test_a_bad_node_hello_says_what_was_given_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Rejected, match=message) as refusal:
        inbound.node_hello(node_hello(**changes), "session")
    assert refusal.value.kind is Refusal.INVALID
    assert len(refusal.value.message) < 400
    assert KEY not in refusal.value.message


def test_another_protocol_version_is_told_which_one_is_spoken() -> None:
    with pytest.raises(Rejected, match="protocol_version is 2; this controller speaks 1") as refusal:
        inbound.node_hello(node_hello(protocol_version=2), "session")
    assert refusal.value.kind is Refusal.PRECONDITION
    with pytest.raises(Rejected, match="protocol_version is 0"):
        inbound.worker_hello(worker_hello(protocol_version=0), "session")


def test_a_stream_begins_with_hello_and_says_it_once() -> None:
    with pytest.raises(Rejected, match="the first message is heartbeat; a stream begins with hello"):
        inbound.node_hello(rendezvous.AttendRequest(heartbeat=rendezvous.NodeHeartbeat()), "s")
    with pytest.raises(Rejected, match="the first message is of a kind that this release does not know"):
        inbound.worker_hello(training.TrainRequest(), "s")
    with pytest.raises(Rejected, match="hello comes once"):
        inbound.node_event(node_hello(), "n0", "s")
    with pytest.raises(Rejected, match="hello comes once"):
        inbound.worker_event(worker_hello(), "s")


@pytest.mark.parametrize(
    ("reason", "failed", "succeeded"),
    [
        (rendezvous.LEAVE_REASON_DRAIN, False, False),
        (rendezvous.LEAVE_REASON_FAILED, True, False),
        (rendezvous.LEAVE_REASON_SUCCEEDED, False, True),
    ],
)
def test_how_a_node_leaves(reason: rendezvous.LeaveReason.ValueType, failed: bool, succeeded: bool) -> None:
    message = rendezvous.AttendRequest(leave=rendezvous.NodeLeave(reason=reason, message="why"))
    assert inbound.node_event(message, "n0", "s") == ev.NodeLeft("n0", "s", failed, succeeded, "why")


def test_other_messages_of_nodes_and_workers_become_their_events() -> None:
    heartbeat = rendezvous.AttendRequest(heartbeat=rendezvous.NodeHeartbeat(generation=2))
    assert inbound.node_event(heartbeat, "n0", "s") == ev.NodeHeartbeat("n0", "s")
    succeeded = rendezvous.AttendRequest(succeeded=rendezvous.NodeSucceeded(generation=2))
    assert inbound.node_event(succeeded, "n0", "s") == ev.NodeSucceeded("n0", "s", 2)
    left = training.TrainRequest(left=training.WorkerLeft(generation=2, step=9))
    assert inbound.worker_event(left, "s") == ev.WorkerLeft("s", 2, 9)
    finished = training.TrainRequest(finished=training.WorkerFinished(generation=2, step=9, tau=10.5))
    assert inbound.worker_event(finished, "s") == ev.WorkerFinished("s", 2, 9, 10.5)
    draining = training.TrainRequest(draining=training.WorkerDraining(generation=2))
    assert inbound.worker_event(draining, "s") == ev.WorkerDraining("s", 2)
    idle = training.TrainRequest(draining=training.WorkerDraining())
    assert inbound.worker_event(idle, "s") == ev.WorkerDraining("s", 0), "a live worker in no generation"
    ended = rendezvous.AttendRequest(succeeded=rendezvous.NodeSucceeded())
    assert inbound.node_event(ended, "n0", "s") == ev.NodeSucceeded("n0", "s", 0), "an agent of live workers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": 0}, "generation is 0"),
        ({"step": -1}, "step is -1"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": -0.5}, "tau is -0.5"),
        ({"scale": math.inf}, "scale is inf"),
        ({"generation_gain_sum": math.nan}, "generation_gain_sum is nan"),
        ({"samples": 2**60}, "samples is"),
        ({"effective_lr": [0.1] * 2000}, "effective_lr has 2000 values; at most 1024"),
        ({"orthogonality": [0.5, 1.0]}, "orthogonality has 2 values; give minimum, median and maximum"),
        ({"step_seconds": types.Histogram(upper_bounds=[1.0])}, "1 upper_bounds and 0 cumulative_counts"),
        ({"step_seconds": types.Histogram(upper_bounds=[2, 1], cumulative_counts=[0, 0])}, "must rise"),
        ({"step_seconds": types.Histogram(upper_bounds=[math.nan], cumulative_counts=[0])}, "must rise"),
        ({"step_seconds": types.Histogram(upper_bounds=[1], cumulative_counts=[3], count=2)}, "must not fall"),
        ({"step_seconds": types.Histogram(upper_bounds=[1], cumulative_counts=[-1])}, "begin below 0"),
    ],
)
def test_bad_progress_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Rejected, match=message):
        inbound.worker_event(progress(**changes), "s")


def test_a_diverged_run_may_still_report_its_loss_and_negative_estimates() -> None:
    event = inbound.worker_event(progress(loss=math.inf, variance=-0.25, sqr_norm=-1.0), "s")
    assert isinstance(event, ev.WorkerProgressed)
    assert (event.progress.loss, event.progress.variance, event.progress.sqr_norm) == (math.inf, -0.25, -1.0)


counts = st.integers(0, 2**53 - 1)
amounts = st.floats(0, 1e300)
rates = st.lists(st.floats(allow_nan=False), max_size=5).map(tuple)


@st.composite
def histograms(draw: st.DrawFn) -> Histogram:
    bounds = sorted(draw(st.sets(amounts, max_size=8)))
    cumulative = sorted(draw(st.lists(st.integers(0, 2**40), min_size=len(bounds) + 1, max_size=len(bounds) + 1)))
    return Histogram(tuple(bounds), tuple(cumulative[:-1]), cumulative[-1], draw(amounts))


@given(
    st.builds(
        Progress,
        generation=st.integers(1, 2**53 - 1),
        step=counts,
        tau=amounts,
        gain=st.floats(allow_nan=False),
        scale=amounts,
        loss=st.floats(allow_nan=False),
        effective_lr=rates,
        base_lr=rates,
        variance=st.floats(allow_nan=False),
        sqr_norm=st.floats(allow_nan=False),
        samples=counts,
        epoch=counts,
        generation_steps=counts,
        generation_gain_sum=amounts,
        pause_s=amounts,
        step_seconds=histograms(),
        orthogonality=st.sampled_from([(), (0.25, 0.5, 1.0)]),
    )
)
def test_progress_survives_the_wire(value: Progress) -> None:
    message = training.TrainRequest.FromString(
        training.TrainRequest(progress=outbound.progress(value)).SerializeToString()
    )
    assert inbound.worker_event(message, "s") == ev.WorkerProgressed("s", value)


@given(st.builds(Checkpoint, st.integers(1, 2**40), counts, amounts, st.text(max_size=100), counts, amounts))
def test_checkpoints_survive_the_wire(value: Checkpoint) -> None:
    message = training.TrainRequest(checkpoint=outbound.checkpoint(value))
    assert inbound.worker_event(message, "s") == ev.CheckpointCommitted("s", value)


@pytest.mark.parametrize("mode", [None, *Mode])
def test_specs_survive_the_wire(mode: Mode | None) -> None:
    spec = JobSpec(2, 8, mode, base_batch_size=64, global_batch_size=1024, target_tau=1e4)
    assert inbound.job_spec(outbound.job_spec(spec)) == spec


def test_actions_become_the_messages_of_their_stream() -> None:
    members = (
        Member("n0", 0, 2, 0, "10.0.0.1", 29500, 29501),
        Member("n1", 1, 1, 2, "10.0.0.2"),
        Member("n2", 2, 1, 3, "10.0.0.3"),
    )
    generation = Generation(4, members, 3.0, "n1 joined")
    assigned = outbound.to_node(act.Assign("n1", 7, generation, at_fault=True)).assignment
    assert (assigned.request_id, assigned.at_fault) == (7, True)
    assert (assigned.node_count, assigned.generation.world_size) == (3, 4)
    assert [member.first_rank for member in assigned.generation.members] == [0, 2], "the leader's place and its own"
    assert assigned.generation.members[0].store_port == 29501
    assert outbound.to_node(act.StopWorkers("n0", 4, "why")).stop_workers.generation == 4
    assert outbound.to_node(act.Dismiss("n0", True, "done")).dismissed.success
    assert outbound.to_node(act.FinishGeneration("n0", 4)).generation_finished.generation == 4
    assert to_worker(act.WelcomeWorker("s", 2.5)).welcome == training.WorkerWelcome(
        protocol_version=1, controller_id="id", scale=2.5, heartbeat_interval_s=0.5
    )
    leave = training.LeaveGeneration(generation=4, reason="why", save=True)
    assert to_worker(act.AskToLeave("s", 4, "why", save=True)).leave == leave
    assert not to_worker(act.AskToLeave("s", 4, "why", save=False)).leave.save
    assert to_worker(act.AskToSave("s", 4, "why")).save == training.SaveCheckpoint(generation=4, reason="why")
    assert to_worker(act.FenceWorker("s", 3, "over")).fenced.generation == 3


def test_actions_of_in_process_mode_become_their_messages() -> None:
    started = outbound.to_node(act.StartWorkers("n0", 7, at_fault=True)).start_workers
    assert (started.request_id, started.at_fault) == (7, True)
    assert not outbound.to_node(act.StopWorkers("n0", 4, "why")).stop_workers.force
    assert outbound.to_node(act.StopWorkers("n0", 4, "why", force=True)).stop_workers.force
    members = (
        Member("n0", 0, 2, 0, "10.0.0.1", seats=(Seat(11, 29001, 29002), Seat(12, 29003, 29004))),
        Member("n1", 1, 1, 2, "10.0.0.2", seats=(Seat(9, 29005, 29006),)),
    )
    generation = Generation(4, members, 3.0, "n1 joins", source_rank=1, in_step=False)
    assert to_worker(act.AssignWorker("s", 9, generation, 2)).assignment == training.WorkerAssignment(
        request_id=9,
        generation=4,
        rank=2,
        places=[
            training.WorkerPlace(node_id="n0", address="10.0.0.1", store_port=29001, preflight_port=29002),
            training.WorkerPlace(node_id="n0", address="10.0.0.1", store_port=29003, preflight_port=29004),
            training.WorkerPlace(node_id="n1", address="10.0.0.2", store_port=29005, preflight_port=29006),
        ],
        source_rank=1,
        scale=3.0,
        reason="n1 joins",
    )
    assert to_worker(act.CutGeneration("s", 4, "n1 is gone")).cut == training.CutGeneration(
        generation=4, reason="n1 is gone"
    )
    assert to_worker(act.SaveAndExit("s", "too few")).save_and_exit.reason == "too few"


def to_worker(action: StreamAction) -> training.TrainResponse:
    return outbound.to_worker(action, "id", 0.5)


def test_a_live_worker_s_hello_asks_for_a_place() -> None:
    ready = training.WorkerReady(
        request_id=8,
        generation=3,
        version_generation=2,
        version_step=40,
        failed=True,
        unreachable=[1, 4],
        store_port=29001,
        preflight_port=29002,
    )
    _, event = inbound.worker_hello(worker_hello(rank=-1, generation=0, local_rank=1, ready=ready), "s")
    asked = WorkerReady(8, 3, Version(2, 40), True, (1, 4), 29001, 29002)
    assert event == ev.WorkerHello("s", "n0", 1, -1, 0, JobSpec(), asked)
    assert inbound.worker_event(training.TrainRequest(ready=ready), "s") == ev.WorkerAsked("s", asked)
    alive = training.WorkerAlive(generation=3, step=41, working_s=0.5, waiting_s=0.25, median_step_s=0.125)
    pace = Pace(3, 41, 0.5, 0.25, 0.125)
    assert inbound.worker_event(training.TrainRequest(alive=alive), "s") == ev.WorkerAlive("s", pace)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -2}, "rank is -2"),
        ({"rank": -1}, "rank is -1 and generation is 3; a worker in a generation has a rank from 0"),
        ({"generation": 0}, "rank is 0 and generation is 0"),
        ({"generation": -1}, "generation is -1"),
        ({"local_rank": -1}, "local_rank is -1"),
        ({"ready": training.WorkerReady(request_id=1)}, "ready comes with generation 3; only a worker that is in none"),
    ],
)
def test_a_bad_worker_hello_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Rejected, match=message) as refusal:
        inbound.worker_hello(worker_hello(**changes), "s")
    assert refusal.value.kind is Refusal.INVALID


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_id": 0}, "request_id is 0"),
        ({"generation": -1}, "generation is -1"),
        ({"version_generation": 4}, "version_generation is 4 and generation is 3; a state is no newer"),
        ({"version_step": -1}, "version_step is -1"),
        ({"unreachable": [2, -1]}, "unreachable is -1"),
        ({"unreachable": [0] * 5000}, "unreachable has 5000 ranks; at most 4096"),
        ({"store_port": 65536}, "store_port is 65536"),
        ({"preflight_port": -1}, "preflight_port is -1"),
    ],
)
def test_a_bad_request_of_a_live_worker_is_refused(changes: dict[str, Any], message: str) -> None:
    ready = training.WorkerReady(**{"request_id": 1, "generation": 3, **changes})
    with pytest.raises(Rejected, match=message):
        inbound.worker_event(training.TrainRequest(ready=ready), "s")
    with pytest.raises(Rejected, match=message):
        inbound.worker_hello(worker_hello(rank=-1, generation=0, ready=ready), "s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": -1}, "generation is -1"),
        ({"step": -1}, "step is -1"),
        ({"working_s": math.nan}, "working_s is nan"),
        ({"waiting_s": -0.5}, "waiting_s is -0.5"),
        ({"median_step_s": math.inf}, "median_step_s is inf"),
    ],
)
def test_a_bad_sign_of_life_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Rejected, match=message):
        inbound.worker_event(training.TrainRequest(alive=training.WorkerAlive(**changes)), "s")


def test_a_failed_checkpoint_is_heard_with_its_reason() -> None:
    failed = types.CheckpointFailed(generation=4, step=7, reason="no space left")
    heard = inbound.worker_event(training.TrainRequest(checkpoint_failed=failed), "s")
    assert heard == ev.CheckpointFailed("s", 4, 7, "no space left")
    too_long = training.TrainRequest(checkpoint_failed=types.CheckpointFailed(generation=4, reason="x" * 1001))
    with pytest.raises(Rejected, match="reason has 1001 characters"):
        inbound.worker_event(too_long, "s")
