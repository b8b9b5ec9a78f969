"""A real controller refuses what a live worker may not say: one clear error each, and the job is what it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from harness.controller import ControllerProcess
from harness.raw import RawLiveWorker, RawNode
from harness.raw_job import PATIENT_LIMITS, RawJob, eventually
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

pytestmark = pytest.mark.e2e


class TestBadInput:
    """One clear error each; the job is what it was; the controller lives."""

    @pytest.fixture(scope="class")
    @classmethod
    def job(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawJob]:
        """One for all of them: n0 and n1 train, n2 is a spare."""
        directory = tmp_path_factory.mktemp("controller")
        with ControllerProcess(directory, **PATIENT_LIMITS) as controller, RawJob(controller, max_nodes=2) as job:
            job.pair()
            job.comes("n2")
            yield job

    @pytest.fixture(autouse=True)
    def nothing_changes(self, job: RawJob) -> Iterator[None]:
        eventually(lambda: len(job.shown()["nodes"]) == 3)
        before, events = _durable(job), job.controller.get("/api/v1/jobs/a/events")
        yield
        assert job.controller.alive()
        assert _durable(job) == before
        assert job.controller.get("/api/v1/jobs/a/events") == events
        assert "Traceback" not in job.controller.log

    @pytest.mark.parametrize(
        ("changes", "code", "message"),
        [
            ({"rank": 1}, grpc.StatusCode.INVALID_ARGUMENT, "rank is 1 and generation is 0"),
            ({"generation": 1}, grpc.StatusCode.INVALID_ARGUMENT, "rank is -1 and generation is 1"),
            ({"rank": -2}, grpc.StatusCode.INVALID_ARGUMENT, "rank is -2"),
            ({"local_rank": 1}, grpc.StatusCode.INVALID_ARGUMENT, "local rank 1 is not below 1, the slots of n2"),
            (
                {"rank": 0, "generation": 1, "ready": training.WorkerReady(request_id=1)},
                grpc.StatusCode.INVALID_ARGUMENT,
                "ready comes with generation 1",
            ),
            (
                {"ready": training.WorkerReady(request_id=1, version_generation=2)},
                grpc.StatusCode.INVALID_ARGUMENT,
                "version_generation is 2 and generation is 0",
            ),
            (
                {"ready": training.WorkerReady(request_id=1, store_port=70000)},
                grpc.StatusCode.INVALID_ARGUMENT,
                "store_port is 70000",
            ),
            (
                {"spec": types.JobSpec(base_batch_size=9, batch_size=9)},
                grpc.StatusCode.ALREADY_EXISTS,
                "base_batch_size is 9 here, but the job runs with base_batch_size 8",
            ),
            ({"node_id": "n7"}, grpc.StatusCode.UNAVAILABLE, "node n7 is not known; its agent has to say hello first"),
            ({"job": "b"}, grpc.StatusCode.NOT_FOUND, "there is no job b"),
        ],
    )
    def test_hello(self, job: RawJob, changes: dict[str, Any], code: grpc.StatusCode, message: str) -> None:
        with RawLiveWorker(job.controller.grpc, "a", "n2") as worker:
            stream = worker.open(**changes)
            assert stream.next() is None
            refused, details = stream.status()
        assert (refused, message in (details or "")) == (code, True), details

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"ready": training.WorkerReady()}, "request_id is 0"),
            ({"ready": training.WorkerReady(request_id=1, unreachable=[-1])}, "unreachable is -1"),
            ({"alive": training.WorkerAlive(generation=1, waiting_s=math.inf)}, "waiting_s is inf"),
            ({"alive": training.WorkerAlive(generation=1, step=-1)}, "step is -1"),
            ({"progress": types.Progress(generation=0)}, "generation is 0"),
            ({"draining": training.WorkerDraining(generation=-1)}, "generation is -1"),
            ({"hello": training.WorkerHello()}, "hello comes once, first"),
        ],
    )
    def test_later_message(self, job: RawJob, body: dict[str, Any], message: str) -> None:
        with RawLiveWorker(job.controller.grpc, "a", "n2") as worker:
            # Without a request: the spare that waits there takes no notice of it.
            worker.connect(ready=None)
            worker.say(**body)
            assert worker.stream is not None
            assert worker.stream.next() is None
            code, details = worker.stream.status()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message in (details or "")

    def test_live_worker_in_a_job_of_restart_mode(self, job: RawJob) -> None:
        with RawNode(job.controller.grpc, "restarting", "n0") as node:
            node.connect(ready=True)
            node.assignment()
            with RawLiveWorker(job.controller.grpc, "restarting", "n0") as worker:
                stream = worker.open()
                assert stream.next() is None
                code, details = stream.status()
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "job restarting runs in restart mode" in (details or "")
            assert "--rdzv-conf=reconfigure=in-process" in (details or "")


def _durable(job: RawJob) -> Any:
    """The job, without what time alone changes."""
    shown = job.shown()
    for node in shown["nodes"]:
        del node["silent_s"]
    del shown["progress_rate"], shown["remaining_s"]
    return shown
