"""The client of the controller's Jobs service: for the command line, tools and the operator. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, TypeVar

import grpc
from stretto_proto.v1 import jobs_pb2, types_pb2
from stretto_proto.v1.jobs_pb2_grpc import JobsStub

from stretto.channel import leader_of, open_channel, parse_endpoints
from stretto.errors import Retry, from_rpc_error

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)


class _Call(Protocol[RequestT, ResponseT]):
    def __call__(self, request: RequestT, /, *, timeout: float) -> ResponseT: ...


class JobsClient:
    """Asks one controller, or the one of several that leads, about jobs; each call may raise StrettoError.

    endpoint: `HOST[:29400]`, or several with commas between them: the next is asked when one is not available.
    timeout_s: of each call to each endpoint. May be shared by threads. `Retry` means that no controller answered.
    """

    def __init__(self, endpoint: str, *, timeout_s: float = 5.0) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; it must be above 0")
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}
        # The one that answered last comes first.
        self._endpoints = parse_endpoints(endpoint)

    def __enter__(self) -> JobsClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.close()

    def controller(self, endpoint: str) -> jobs_pb2.GetControllerResponse:
        """What the controller at exactly this endpoint says of itself, leader or not."""
        try:
            return JobsStub(self._channel(endpoint)).GetController(
                jobs_pb2.GetControllerRequest(), timeout=self._timeout_s
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, endpoint=endpoint) from error

    @property
    def endpoints(self) -> tuple[str, ...]:
        """HOST:PORT each; the one that answered last comes first."""
        return self._endpoints

    def create(self, job: str, spec: types_pb2.JobSpec, *, desired_nodes: int = 0) -> jobs_pb2.Job:
        """Create a job before any node comes. desired_nodes: 0 means max_nodes."""
        request = jobs_pb2.CreateJobRequest(job=job, spec=spec, desired_nodes=desired_nodes)
        return self._ask("CreateJob", request, jobs_pb2.CreateJobResponse).job

    def list(self) -> Sequence[jobs_pb2.Job]:
        """Every job that the controller knows, by name."""
        response = self._ask("ListJobs", jobs_pb2.ListJobsRequest(), jobs_pb2.ListJobsResponse)
        return sorted(response.jobs, key=lambda job: job.name)

    def get(self, job: str) -> jobs_pb2.Job:
        """One job as it is now. Raises NotFound if there is none of this name."""
        return self._ask("GetJob", jobs_pb2.GetJobRequest(job=job), jobs_pb2.GetJobResponse).job

    def scale(self, job: str, nodes: int) -> jobs_pb2.Job:
        """How many nodes the job should have from now on, within its minimum and maximum."""
        request = jobs_pb2.ScaleJobRequest(job=job, nodes=nodes)
        return self._ask("ScaleJob", request, jobs_pb2.ScaleJobResponse).job

    def set_autoscale(self, job: str, autoscale: types_pb2.Autoscale) -> jobs_pb2.Job:
        """How the job's size is chosen from now on. Fields that are zero stay as they are."""
        request = jobs_pb2.SetAutoscaleRequest(job=job, autoscale=autoscale)
        return self._ask("SetAutoscale", request, jobs_pb2.SetAutoscaleResponse).job

    def pause(self, job: str) -> jobs_pb2.Job:
        """Save, stop the workers, keep the nodes."""
        return self._ask("PauseJob", jobs_pb2.PauseJobRequest(job=job), jobs_pb2.PauseJobResponse).job

    def resume(self, job: str) -> jobs_pb2.Job:
        """Go on after a pause."""
        return self._ask("ResumeJob", jobs_pb2.ResumeJobRequest(job=job), jobs_pb2.ResumeJobResponse).job

    def drain(self, job: str, node_id: str) -> jobs_pb2.Job:
        """Let one node leave at the next step boundary, with nothing lost."""
        request = jobs_pb2.DrainNodeRequest(job=job, node_id=node_id)
        return self._ask("DrainNode", request, jobs_pb2.DrainNodeResponse).job

    def checkpoint(self, job: str) -> jobs_pb2.Job:
        """Have a checkpoint written at the next step boundary; training goes on."""
        request = jobs_pb2.CheckpointJobRequest(job=job)
        return self._ask("CheckpointJob", request, jobs_pb2.CheckpointJobResponse).job

    def delete(self, job: str) -> None:
        """Dismiss the job's nodes and forget it."""
        self._ask("DeleteJob", jobs_pb2.DeleteJobRequest(job=job), jobs_pb2.DeleteJobResponse)

    def events(self, job: str, *, after_sequence: int = 0) -> Sequence[jobs_pb2.Event]:
        """The job's story, oldest first, each event with its reason."""
        request = jobs_pb2.ListEventsRequest(job=job, after_sequence=after_sequence)
        return [*self._ask("ListEvents", request, jobs_pb2.ListEventsResponse).events]

    def generations(self, job: str) -> Sequence[jobs_pb2.GenerationSummary]:
        """The job's generations, oldest first: members, scale, gain, steps, pause."""
        request = jobs_pb2.ListGenerationsRequest(job=job)
        return [*self._ask("ListGenerations", request, jobs_pb2.ListGenerationsResponse).generations]

    def points(self, job: str, *, after_s: float = 0.0) -> jobs_pb2.ListPointsResponse:
        """The job's figures over time, oldest first. after_s: only later ones, in seconds since the Unix epoch."""
        return self._ask(
            "ListPoints", jobs_pb2.ListPointsRequest(job=job, after_s=after_s), jobs_pb2.ListPointsResponse
        )

    def _ask(self, method: str, request: RequestT, kind: type[ResponseT]) -> ResponseT:
        """Call `method` at the endpoint that answered last, else at the leader that it names, else at the others."""
        failure: Retry | None = None
        waiting, asked = list(self._endpoints), set[str]()
        while waiting:
            endpoint = waiting.pop(0)
            asked.add(endpoint)
            call: _Call[RequestT, ResponseT] = getattr(JobsStub(self._channel(endpoint)), method)
            try:
                response = call(request, timeout=self._timeout_s)
            except grpc.RpcError as error:
                raised = from_rpc_error(error, endpoint=endpoint)
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not isinstance(raised, Retry):
                    if isinstance(raised, Retry):
                        self._prefer(*(each for each in self._endpoints if each != endpoint), endpoint)
                    raise raised from error
                raised.__cause__ = error
                # What a follower says is more to the point than that another could not be reached.
                leader = leader_of(error)
                failure = raised if failure is None or leader else failure
                waiting = [*([leader] if leader and leader not in asked else []), *(w for w in waiting if w != leader)]
            else:
                self._prefer(endpoint, *(each for each in self._endpoints if each != endpoint))
                return response
        assert failure is not None
        raise failure

    def _prefer(self, *endpoints: str) -> None:
        self._endpoints = endpoints

    def _channel(self, endpoint: str) -> grpc.Channel:
        with self._lock:
            if endpoint not in self._channels:
                self._channels[endpoint] = open_channel(endpoint)
            return self._channels[endpoint]
