"""A real controller and raw clients of in-process mode: who is told what, in which order, through kill -9 and all."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness.controller import ControllerProcess
from harness.raw_job import BATCHES, PATIENT_LIMITS, RawJob, eventually
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

pytestmark = pytest.mark.e2e


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path, **PATIENT_LIMITS) as controller:
        yield controller


@pytest.fixture
def job(controller: ControllerProcess) -> Iterator[RawJob]:
    with RawJob(controller) as job:
        yield job


def places(assignment: training.WorkerAssignment) -> list[tuple[str, int, int]]:
    assert {place.address for place in assignment.places} == {"127.0.0.1"}
    return [(place.node_id, place.store_port, place.preflight_port) for place in assignment.places]


def test_workers_ask_for_their_places_and_meet_their_peers(job: RawJob) -> None:
    job.agent("n0", slots=2)
    job.agent("n1")
    workers = [job.worker("n0"), job.worker("n0", 1), job.worker("n1")]
    for worker in reversed(workers):
        welcome = worker.connect(spec=BATCHES)
        assert (welcome.scale, welcome.heartbeat_interval_s) == (0.0, 1.0)
    assigned = [worker.place() for worker in workers]
    assert [(a.generation, a.rank, a.source_rank, a.in_step, a.scale) for a in assigned] == [
        (1, rank, -1, False, 3.0) for rank in range(3)
    ]
    expected = [("n0", 20000, 30000), ("n0", 20001, 30001), ("n1", 20002, 30002)]
    assert [places(a) for a in assigned] == [expected] * 3
    assert assigned[0].reason == "started with 2 nodes"
    assert job.shown()["generation"]["world_size"] == 3


def test_a_newcomer_is_given_the_state_at_a_step_boundary_and_drains_again(job: RawJob) -> None:
    n0, n1 = job.pair()
    job.scale(3)
    (n2,) = job.comes("n2")
    for worker in (n0, n1):
        leave = worker.hears("leave")
        assert (leave.generation, leave.save) == (1, False)
        assert "n2 joins" in leave.reason
        worker.ask(12)
    assigned = [worker.place() for worker in (n0, n1, n2)]
    assert [(a.generation, a.rank, a.source_rank, a.in_step) for a in assigned] == [(2, r, 0, False) for r in range(3)]
    job.request("DrainNode", jobs.DrainNodeRequest(job="a", node_id="n0"))
    for worker in (n0, n1, n2):
        assert not worker.hears("leave").save, "two of three keep the state"
        worker.ask(20)
    assert job.nodes["n0"].hears("dismissed").success
    assigned = [worker.place() for worker in (n1, n2)]
    assert [(a.generation, a.rank, a.source_rank, a.in_step) for a in assigned] == [(3, r, 0, True) for r in range(2)]
    assert [place.node_id for place in assigned[0].places] == ["n1", "n2"]


def test_a_crashed_worker_s_peers_go_on_and_it_comes_back(job: RawJob) -> None:
    n0, n1 = job.pair()
    job.nodes["n1"].ready(failed=True, exit_signal=9)
    assert job.nodes["n1"].hears("start_workers").at_fault
    cut = n0.hears("cut")
    assert (cut.generation, cut.reason) == (1, "n1 gone")
    n0.alive()
    n0.ask(10, failed=True)
    alone = n0.place()
    assert (alone.generation, alone.rank, alone.source_rank, alone.in_step) == (2, 0, 0, True)
    assert [place.node_id for place in alone.places] == ["n0"]
    # The crashed worker's process is another one now; the old one's stream was ended.
    assert n1.stream is not None
    assert n1.stream.next() is None
    assert n1.stream.status()[0] is grpc.StatusCode.ABORTED
    job.worker("n1").connect()
    assert n0.hears("save").reason == "the job has shrunk to its minimum"
    assert n0.hears("leave").generation == 2
    n0.ask(15)
    assert (n0.place().source_rank, job.workers["n1"].place().rank) == (0, 1)


def test_the_most_advanced_survivor_gives_its_state(job: RawJob) -> None:
    n0, n1 = job.pair()
    n0.ask(10, failed=True)
    assert n1.hears("cut").generation == 1
    n1.ask(11, failed=True)
    assert [worker.place().source_rank for worker in (n0, n1)] == [1, 1]


def test_an_assignment_that_a_kill_swallowed_is_given_again(job: RawJob) -> None:
    n0, n1 = job.comes("n0", "n1")
    first = [n0.place(), n1.place()]
    # As if n1 had never had it.
    n1.rank, n1.generation = -1, 0
    job.controller.restart()
    for node_id in ("n0", "n1"):
        job.nodes[node_id].connect()
    assert n0.connect().scale == 2.0
    n1.connect()
    assert n1.place() == first[1]
    n0.progress(1)
    eventually(lambda: (job.shown()["progress"] or {}).get("step") == 1)
    assert job.shown()["generation"]["number"] == 1


def test_a_kill_in_the_middle_of_a_change_does_not_stop_it(job: RawJob) -> None:
    n0, n1 = job.pair()
    n0.ask(10, failed=True)
    n1.hears("cut")
    job.controller.restart()
    assert job.shown()["phase"] == "reconfiguring"
    for node_id in ("n0", "n1"):
        job.nodes[node_id].connect()
    n0.connect()
    n1.connect()
    assert n1.hears("cut").generation == 1, "who missed the cut is told again"
    n1.ask(10, failed=True)
    assert [worker.place().generation for worker in (n0, n1)] == [2, 2]


def test_below_min_nodes_the_state_waits_in_memory(controller: ControllerProcess) -> None:
    with RawJob(controller, min_nodes=2) as job:
        n0, _ = job.pair()
        job.nodes["n1"].say(leave=rendezvous.NodeLeave(reason=rendezvous.LEAVE_REASON_FAILED, message="broken disk"))
        n0.hears("cut")
        n0.ask(10, failed=True)
        eventually(lambda: job.shown()["phase"] == "waiting")
        assert job.shown()["reason"] == "1 of at least 2 nodes are there; they keep the state"
        with urllib.request.urlopen(f"{controller.http}/metrics", timeout=10) as metrics:
            assert b'stretto_phase{training_job="a",phase="waiting"} 1' in metrics.read()
        # The state may be saved meanwhile, and the controller may fail.
        n0.say(checkpoint=types.CheckpointCommitted(generation=1, step=10, tau=10, path="/c"))
        eventually(lambda: (job.shown()["checkpoint"] or {}).get("step") == 10)
        controller.restart()
        job.nodes["n0"].connect()
        n0.connect()
        eventually(lambda: job.shown()["phase"] == "waiting")
        (n2,) = job.comes("n2")
        assert [(a.generation, a.rank, a.source_rank) for a in (n0.place(), n2.place())] == [(2, 0, 0), (2, 1, 0)]


def test_survivors_save_and_exit_when_nobody_comes(tmp_path: Path) -> None:
    limits = {**PATIENT_LIMITS, "STRETTO_LIMITS_WAITING_LIMIT_S": "0.5"}
    with ControllerProcess(tmp_path, **limits) as controller, RawJob(controller, min_nodes=2) as job:
        n0, _ = job.pair()
        job.nodes["n1"].say(leave=rendezvous.NodeLeave(reason=rendezvous.LEAVE_REASON_DRAIN))
        n0.hears("cut")
        n0.ask(10, failed=True)
        assert n0.hears("save_and_exit").reason == "fewer than 2 nodes for 0.5 s"
        dismissed = job.nodes["n0"].hears("dismissed")
        assert (dismissed.success, dismissed.reason) == (False, "fewer than 2 nodes for 0.5 s")
        assert job.shown()["phase"] == "failed"
        # Whoever was away at that moment hears of it at its next hello.
        n0.connect()
        n0.hears("save_and_exit")


def test_a_pause_is_saved_and_resumed_from_memory(job: RawJob) -> None:
    n0, n1 = job.pair()
    job.request("PauseJob", jobs.PauseJobRequest(job="a"))
    for worker in (n0, n1):
        assert worker.hears("leave").save
    n0.say(checkpoint=types.CheckpointCommitted(generation=1, step=12, tau=12, path="/c"))
    for worker in (n0, n1):
        worker.ask(12)
    eventually(lambda: job.shown()["phase"] == "paused")
    assert job.shown()["checkpoint"]["step"] == 12
    job.request("ResumeJob", jobs.ResumeJobRequest(job="a"))
    assert [(a.generation, a.in_step) for a in (n0.place(), n1.place())] == [(2, True)] * 2


def test_the_last_node_to_drain_saves_first(job: RawJob) -> None:
    job.scale(1)
    (n0,) = job.comes("n0")
    n0.place()
    n0.say(draining=training.WorkerDraining(generation=1))
    assert n0.hears("leave").save
    n0.ask(5)
    # Its checkpoint did not reach the controller, so it is asked once more.
    assert "nobody else holds the state" in n0.hears("save_and_exit").reason
    job.nodes["n0"].say(succeeded=rendezvous.NodeSucceeded())
    assert job.nodes["n0"].hears("dismissed").success
    eventually(lambda: job.shown()["phase"] == "pending")


def test_a_job_ends_well_though_its_workers_end_one_by_one(job: RawJob) -> None:
    n0, n1 = job.pair()
    n0.say(finished=training.WorkerFinished(generation=1, step=20, tau=20))
    eventually(lambda: bool(job.events("target_reached")))
    assert n0.stream is not None
    n0.stream.half_close()
    n1.ask(20, failed=True)
    job.nodes["n0"].say(succeeded=rendezvous.NodeSucceeded(generation=0))
    assert job.nodes["n0"].hears("generation_finished").generation == 1
    assert job.nodes["n1"].hears("dismissed").success
    assert job.shown()["phase"] == "succeeded"


def test_who_does_not_answer_the_cut_is_ended_by_its_agent_and_kept_out_until_then(job: RawJob) -> None:
    n0, n1 = job.pair()
    n0.ask(10, failed=True)
    stop = job.nodes["n1"].hears("stop_workers")
    assert (stop.generation, stop.force) == (1, True)
    assert n0.place().generation == 2
    # It was only stopped, and goes on now.
    n1.rank, n1.generation = 1, 1
    stream = n1.open()
    assert stream.next() is None
    code, message = stream.status()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "the workers of n1 are being ended" in message
    job.nodes["n1"].ready()
    assert not job.nodes["n1"].hears("start_workers").at_fault
    job.worker("n1").connect()
    assert n0.hears("save").reason == "the job has shrunk to its minimum"
    assert n0.hears("leave").generation == 2


def test_a_slow_worker_is_named_and_ended_when_others_have_waited_too_long(tmp_path: Path) -> None:
    with (
        ControllerProcess(tmp_path, **PATIENT_LIMITS, STRETTO_LIMITS_HANG_LIMIT_S="100") as controller,
        RawJob(controller) as job,
    ):
        n0, n1 = job.pair()
        n1.alive(12, working_s=7.0, median_step_s=0.5)
        n0.alive(12, waiting_s=5.0, median_step_s=0.5)
        eventually(lambda: bool(job.events("worker_slow")))
        (slow,) = job.events("worker_slow")
        assert (slow["node_id"], slow["generation"]) == ("n1", 1)
        assert slow["reason"].startswith("rank 1 on n1 is slow: others have waited ")
        assert slow["reason"].endswith("s for it at step 12, and a step usually takes 0.5 s")
        with urllib.request.urlopen(f"{controller.http}/metrics", timeout=10) as metrics:
            text = metrics.read().decode()
        ratio = next(line for line in text.splitlines() if line.startswith("stretto_straggler_ratio{"))
        assert float(ratio.split()[-1]) >= 14.0
        assert job.shown()["phase"] == "running", "nothing is cut yet"
        n1.alive(12, working_s=107.0, median_step_s=0.5)
        n0.alive(12, waiting_s=105.0, median_step_s=0.5)
        stop = job.nodes["n1"].hears("stop_workers")
        assert stop.force
        assert stop.reason.startswith("rank 1 on n1 hangs: others have waited ")
        assert len(job.events("worker_slow")) == 1
        assert n0.hears("cut").generation == 1
