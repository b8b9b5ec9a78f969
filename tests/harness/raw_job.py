"""A job of in-process mode against a real controller, its agents and workers all raw clients."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import types_pb2 as types
from stretto_proto.v1.jobs_pb2_grpc import JobsStub

from harness.controller import ControllerProcess
from harness.raw import RawLiveWorker, RawNode

PATIENT_LIMITS = {
    # These clients send heartbeats only where a test is about them.
    "STRETTO_LIMITS_MISSED_HEARTBEATS": "1000",
    # A generation begins when the wanted number of nodes is there, however slow the machine is.
    "STRETTO_LIMITS_SETTLE_S": "600",
    "STRETTO_LIMITS_SETTLE_LIMIT_S": "600",
}
BATCHES = types.JobSpec(base_batch_size=8, batch_size=8)


class RawJob:
    """Job a in in-process mode, and its agents and workers by node; each node has one worker unless said otherwise."""

    def __init__(self, controller: ControllerProcess, *, wanted: int = 2, **spec: int) -> None:
        self.controller = controller
        self._spec: dict[str, Any] = {"min_nodes": 1, "max_nodes": 3, "mode": types.RECONFIGURE_MODE_IN_PROCESS, **spec}
        self._stack = ExitStack()
        self.nodes: dict[str, RawNode] = {}
        self.workers: dict[str, RawLiveWorker] = {}

        created = types.JobSpec(**self._spec)
        self.request("CreateJob", jobs.CreateJobRequest(job="a", spec=created, desired_nodes=wanted))

    def __enter__(self) -> RawJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def agent(self, node_id: str, slots: int = 1) -> RawNode:
        """An agent that may start its workers."""
        node = self._stack.enter_context(RawNode(self.controller.grpc, "a", node_id, **self._spec))
        node.slots = slots
        node.connect(ready=True)
        started = node.hears("start_workers")
        assert (started.request_id, started.at_fault) == (1, False)
        self.nodes[node_id] = node
        return node

    def worker(self, node_id: str, local_rank: int = 0) -> RawLiveWorker:
        """A worker process that is yet to say hello."""
        name = f"{node_id}/{local_rank}" if local_rank else node_id
        worker = self._stack.enter_context(RawLiveWorker(self.controller.grpc, "a", node_id, local_rank))
        number = len(self.workers)
        worker.request.store_port, worker.request.preflight_port = 20000 + number, 30000 + number
        self.workers[name] = worker
        return worker

    def comes(self, *node_ids: str) -> list[RawLiveWorker]:
        """Nodes whose workers ask for a place."""
        for node_id in node_ids:
            self.agent(node_id)
            self.worker(node_id).connect(spec=BATCHES)
        return [self.workers[node_id] for node_id in node_ids]

    def pair(self) -> list[RawLiveWorker]:
        """Two nodes that train in generation 1, at step 10."""
        workers = self.comes("n0", "n1")
        assert [worker.place().rank for worker in workers] == [0, 1]
        workers[0].progress(10)
        eventually(lambda: (self.shown()["progress"] or {}).get("step") == 10)
        return workers

    def scale(self, nodes: int) -> None:
        self.request("ScaleJob", jobs.ScaleJobRequest(job="a", nodes=nodes))

    def shown(self) -> Any:
        return self.controller.get("/api/v1/jobs/a")

    def events(self, kind: str) -> list[Any]:
        return [event for event in self.controller.get("/api/v1/jobs/a/events")["events"] if event["kind"] == kind]

    def request(self, method: str, message: Any) -> None:
        with grpc.insecure_channel(self.controller.grpc) as channel:
            getattr(JobsStub(channel), method)(message)


def eventually(check: Callable[[], bool], limit_s: float = 20.0) -> None:
    started_s = time.monotonic()
    while not check():
        assert time.monotonic() - started_s < limit_s, "it did not come true in time"
        time.sleep(0.02)
