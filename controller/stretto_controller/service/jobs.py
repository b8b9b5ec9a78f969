"""The Jobs service: people and tools look at jobs and change what is wanted of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from importlib.metadata import version
from typing import Any, TypeVar

from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1.jobs_pb2_grpc import JobsServicer

from stretto_controller.core import events as ev
from stretto_controller.runner import Runner
from stretto_controller.service.errors import ANSWERED, abort
from stretto_controller.service.streaming import Identity
from stretto_controller.service.streams import Context
from stretto_controller.wire import autoscale, checks, inbound, outbound

Answer = TypeVar("Answer")
_Method = Callable[["JobsService", Any, Context], Awaitable[Answer]]


def _answering(method: _Method[Answer]) -> _Method[Answer]:
    """A refusal becomes its status."""

    @wraps(method)
    async def answered(self: JobsService, request: Any, context: Context) -> Answer:
        try:
            return await method(self, request, context)
        except ANSWERED as error:
            await abort(context, error)

    return answered


class JobsService(JobsServicer):
    """Every change is answered once it is saved, with the job as it is then."""

    def __init__(self, runner: Runner, identity: Identity) -> None:
        self._runner = runner
        self._identity = identity

    @_answering
    async def CreateJob(self, request: jobs.CreateJobRequest, context: Context) -> jobs.CreateJobResponse:
        desired_nodes = checks.count("desired_nodes", request.desired_nodes)
        event = ev.JobCreated(inbound.job_spec(request.spec), desired_nodes, autoscale.change(request.autoscale))
        return jobs.CreateJobResponse(job=await self._decide(request.job, event))

    @_answering
    async def ListJobs(self, request: jobs.ListJobsRequest, context: Context) -> jobs.ListJobsResponse:
        return jobs.ListJobsResponse(jobs=[outbound.job(view) for view in self._runner.views()])

    @_answering
    async def GetJob(self, request: jobs.GetJobRequest, context: Context) -> jobs.GetJobResponse:
        return jobs.GetJobResponse(job=outbound.job(self._runner.view(checks.job_name(request.job))))

    @_answering
    async def ScaleJob(self, request: jobs.ScaleJobRequest, context: Context) -> jobs.ScaleJobResponse:
        event = ev.ScaleRequested(checks.count("nodes", request.nodes, 1))
        return jobs.ScaleJobResponse(job=await self._decide(request.job, event))

    @_answering
    async def SetAutoscale(self, request: jobs.SetAutoscaleRequest, context: Context) -> jobs.SetAutoscaleResponse:
        event = ev.AutoscaleRequested(autoscale.change(request.autoscale))
        return jobs.SetAutoscaleResponse(job=await self._decide(request.job, event))

    @_answering
    async def PauseJob(self, request: jobs.PauseJobRequest, context: Context) -> jobs.PauseJobResponse:
        return jobs.PauseJobResponse(job=await self._decide(request.job, ev.PauseRequested()))

    @_answering
    async def ResumeJob(self, request: jobs.ResumeJobRequest, context: Context) -> jobs.ResumeJobResponse:
        return jobs.ResumeJobResponse(job=await self._decide(request.job, ev.ResumeRequested()))

    @_answering
    async def DrainNode(self, request: jobs.DrainNodeRequest, context: Context) -> jobs.DrainNodeResponse:
        event = ev.DrainRequested(checks.node_id(request.node_id))
        return jobs.DrainNodeResponse(job=await self._decide(request.job, event))

    @_answering
    async def CheckpointJob(self, request: jobs.CheckpointJobRequest, context: Context) -> jobs.CheckpointJobResponse:
        return jobs.CheckpointJobResponse(job=await self._decide(request.job, ev.CheckpointRequested()))

    @_answering
    async def DeleteJob(self, request: jobs.DeleteJobRequest, context: Context) -> jobs.DeleteJobResponse:
        await self._runner.decide(checks.job_name(request.job), ev.DeleteRequested())
        return jobs.DeleteJobResponse()

    @_answering
    async def ListEvents(self, request: jobs.ListEventsRequest, context: Context) -> jobs.ListEventsResponse:
        view = self._runner.view(checks.job_name(request.job))
        after = checks.count("after_sequence", request.after_sequence)
        return jobs.ListEventsResponse(events=[outbound.event(e) for e in view.events if e.sequence > after])

    @_answering
    async def ListGenerations(
        self, request: jobs.ListGenerationsRequest, context: Context
    ) -> jobs.ListGenerationsResponse:
        view = self._runner.view(checks.job_name(request.job))
        return jobs.ListGenerationsResponse(
            generations=[outbound.generation_summary(summary) for summary in view.history]
        )

    async def GetController(self, request: jobs.GetControllerRequest, context: Context) -> jobs.GetControllerResponse:
        ready = self._runner.ready
        return jobs.GetControllerResponse(
            version=version("stretto"),
            protocol_version=inbound.PROTOCOL_VERSION,
            controller_id=self._identity.controller_id,
            ready=ready,
            reason="" if ready else self._runner.reason_not_ready,
            time_s=self._runner.wall_s(),
        )

    @_answering
    async def ListPoints(self, request: jobs.ListPointsRequest, context: Context) -> jobs.ListPointsResponse:
        view = self._runner.view(checks.job_name(request.job))
        return outbound.points(view, checks.amount("after_s", request.after_s))

    async def _decide(self, name: str, event: ev.Event) -> jobs.Job:
        checks.job_name(name)
        await self._runner.decide(name, event)
        return outbound.job(self._runner.view(name))
