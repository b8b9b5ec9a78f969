"""The controller as the operator sees it: one question for all jobs every few seconds, and requests about one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from stretto.client import JobsClient
from stretto.errors import NotFound, Retry, StrettoError
from stretto_proto.v1 import jobs_pb2, types_pb2

from stretto_operator.job import Autoscale, Training
from stretto_operator.requests import Create, Delete, Pause, Request, Resume, Scale, SetAutoscale
from stretto_operator.view import ControllerView, JobView, NodeView

_log = logging.getLogger(__name__)
_MODES = {
    types_pb2.RECONFIGURE_MODE_UNSPECIFIED: "",
    types_pb2.RECONFIGURE_MODE_RESTART: "restart",
    types_pb2.RECONFIGURE_MODE_IN_PROCESS: "in-process",
}
_SCALING_MODES = {
    types_pb2.AUTOSCALE_MODE_UNSPECIFIED: "",
    types_pb2.AUTOSCALE_MODE_OFF: "off",
    types_pb2.AUTOSCALE_MODE_RECOMMEND: "recommend",
    types_pb2.AUTOSCALE_MODE_ACT: "act",
}
_GOALS = {
    types_pb2.AUTOSCALE_GOAL_UNSPECIFIED: "",
    types_pb2.AUTOSCALE_GOAL_PROGRESS: "progress",
    types_pb2.AUTOSCALE_GOAL_COST: "cost",
    types_pb2.AUTOSCALE_GOAL_DEADLINE: "deadline",
}


class Controller(Protocol):
    """What the reconciler needs of a controller."""

    def view(self, job: str) -> ControllerView: ...

    async def ask(self, request: Request) -> None:
        """Never raises: what came of it is in the view."""


class PolledController:
    """A real one. changed: called with a job's name when what is known of it has changed, with nothing for all jobs."""

    def __init__(
        self, client: JobsClient, changed: Callable[[str | None], None], *, interval_s: float, refused_s: float
    ) -> None:
        self._client = client
        self._changed = changed
        self._interval_s = interval_s
        self._refused_s = refused_s
        self._jobs: dict[str, JobView] = {}
        self._refusals: dict[str, tuple[str, float]] = {}
        self._reachable = False
        self._reason = "it was not asked yet"
        self._asked = 0

    def view(self, job: str) -> ControllerView:
        refusal, _ = self._refusals.get(job, ("", 0.0))
        return ControllerView(self._reachable, self._reason, self._jobs.get(job), refusal)

    async def run(self) -> None:
        """Never returns."""
        while True:
            await self.poll()
            await asyncio.sleep(self._interval_s)

    async def poll(self) -> None:
        """Ask once. Never raises."""
        asked = self._asked
        try:
            found = await asyncio.to_thread(self._client.list)
        except (StrettoError, ValueError) as error:
            self._lose(str(error))
            return
        self._find()
        if asked != self._asked:
            # A request was answered meanwhile, and this may be older.
            return
        fresh = {job.name: job_view(job) for job in found}
        before, self._jobs = self._jobs, fresh
        for name in {*before, *fresh}:
            if before.get(name) != fresh.get(name):
                # What was refused may be taken now.
                self._refusals.pop(name, None)
                self._changed(name)

    async def ask(self, request: Request) -> None:
        refusal, until_s = self._refusals.get(request.job, ("", 0.0))
        if refusal and time.monotonic() < until_s:
            return
        self._asked += 1
        try:
            job = await asyncio.to_thread(self._call, request)
        except NotFound:
            self._jobs.pop(request.job, None)
        except Retry as error:
            self._lose(str(error))
        except (StrettoError, ValueError) as error:
            if refusal != str(error):
                _log.warning("the controller refuses %s: %s", request, error)
            self._refusals[request.job] = (str(error), time.monotonic() + self._refused_s)
        else:
            _log.info("the controller took %s", request)
            self._refusals.pop(request.job, None)
            if job is None:
                self._jobs.pop(request.job, None)
            else:
                self._jobs[request.job] = job_view(job)
        self._changed(request.job)

    def _call(self, request: Request) -> jobs_pb2.Job | None:
        match request:
            case Create():
                return self._client.create(request.job, job_spec(request.training), desired_nodes=request.desired_nodes)
            case Scale():
                return self._client.scale(request.job, request.nodes)
            case SetAutoscale():
                return self._client.set_autoscale(request.job, autoscale_message(request.autoscale))
            case Pause():
                return self._client.pause(request.job)
            case Resume():
                return self._client.resume(request.job)
            case Delete():
                self._client.delete(request.job)
                return None

    def _lose(self, reason: str) -> None:
        if self._reachable or reason != self._reason:
            _log.warning("%s", reason)
            self._reachable, self._reason = False, reason
            self._changed(None)

    def _find(self) -> None:
        if not self._reachable:
            _log.info("the controller answers")
            self._reachable, self._reason = True, ""
            self._changed(None)


def job_spec(training: Training) -> types_pb2.JobSpec:
    modes = {name: number for number, name in _MODES.items()}
    return types_pb2.JobSpec(
        min_nodes=training.min_nodes,
        max_nodes=training.max_nodes,
        mode=modes[training.mode],
        base_batch_size=training.base_batch_size,
        batch_size=training.batch_size,
        global_batch_size=training.global_batch_size,
        target_tau=training.target_tau,
    )


def autoscale_message(autoscale: Autoscale) -> types_pb2.Autoscale:
    modes = {name: number for number, name in _SCALING_MODES.items()}
    goals = {name: number for number, name in _GOALS.items()}
    return types_pb2.Autoscale(
        mode=modes[autoscale.mode],
        goal=goals[autoscale.goal],
        efficiency_floor=autoscale.efficiency_floor,
        deadline_s=autoscale.deadline_s,
    )


def job_view(job: jobs_pb2.Job) -> JobView:
    spec = job.spec
    return JobView(
        phase=job.phase,
        reason=job.reason,
        desired_nodes=job.desired_nodes,
        training=Training(
            spec.min_nodes,
            spec.max_nodes,
            _MODES[spec.mode],
            spec.base_batch_size,
            spec.batch_size,
            spec.global_batch_size,
            spec.target_tau,
        ),
        autoscale=Autoscale(
            _SCALING_MODES[job.autoscale.mode],
            _GOALS[job.autoscale.goal],
            job.autoscale.efficiency_floor,
            job.autoscale.deadline_s,
        ),
        recommended_nodes=job.recommendation.nodes,
        generation=job.generation.number,
        scale=job.generation.scale,
        tau=job.progress.tau,
        gain=job.progress.gain,
        progress_rate=job.progress_rate,
        remaining_s=job.remaining_s,
        nodes={node.node_id: NodeView(node.state, node.node_rank) for node in job.nodes},
    )
