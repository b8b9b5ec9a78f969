"""The Jobs client and `stretto jobs` against a scripted controller in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import typer
from stretto.client import JobsClient
from stretto.commands import jobs as command
from stretto.errors import Fatal, NotFound, Retry
from stretto_proto.v1 import jobs_pb2 as pb
from stretto_proto.v1 import jobs_pb2_grpc as rpc
from stretto_proto.v1 import types_pb2
from typer.testing import CliRunner


class ScriptedJobs(rpc.JobsServicer):
    """Knows one job, `digits`; keeps every request; answers `unavailable` as long as it is told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.unavailable = False
        self.job = pb.Job(
            name="digits",
            spec=types_pb2.JobSpec(min_nodes=1, max_nodes=4, target_tau=2000),
            phase="running",
            reason="node-b joined",
            desired_nodes=2,
            nodes=[
                pb.Node(node_id="node-a", state="active", node_rank=0, slots=1, connected=True),
                pb.Node(node_id="node-b", state="spare", node_rank=-1, slots=1),
            ],
            generation=types_pb2.Generation(number=3, scale=2.0),
        )

    def _find(self, request: Any, context: Any) -> pb.Job:
        self.asked.append(request)
        if self.unavailable:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the leader is at 10.0.0.2:29400")
        if request.job != "digits":
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no job {request.job!r}; known: digits")
        return self.job

    def GetController(self, request: Any, context: Any) -> pb.GetControllerResponse:
        return pb.GetControllerResponse()

    def ListJobs(self, request: Any, context: Any) -> pb.ListJobsResponse:
        return pb.ListJobsResponse(jobs=[self.job])

    def GetJob(self, request: Any, context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=self._find(request, context))

    def CreateJob(self, request: Any, context: Any) -> pb.CreateJobResponse:
        self.asked.append(request)
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "the job 'digits' runs already")
        raise AssertionError

    def ScaleJob(self, request: Any, context: Any) -> pb.ScaleJobResponse:
        return pb.ScaleJobResponse(job=self._find(request, context))

    def SetAutoscale(self, request: Any, context: Any) -> pb.SetAutoscaleResponse:
        found = self._find(request, context)
        found.autoscale.MergeFrom(request.autoscale)
        return pb.SetAutoscaleResponse(job=found)

    def PauseJob(self, request: Any, context: Any) -> pb.PauseJobResponse:
        return pb.PauseJobResponse(job=self._find(request, context))

    def ResumeJob(self, request: Any, context: Any) -> pb.ResumeJobResponse:
        return pb.ResumeJobResponse(job=self._find(request, context))

    def DrainNode(self, request: Any, context: Any) -> pb.DrainNodeResponse:
        return pb.DrainNodeResponse(job=self._find(request, context))

    def CheckpointJob(self, request: Any, context: Any) -> pb.CheckpointJobResponse:
        return pb.CheckpointJobResponse(job=self._find(request, context))

    def DeleteJob(self, request: Any, context: Any) -> pb.DeleteJobResponse:
        self._find(request, context)
        return pb.DeleteJobResponse()

    def ListEvents(self, request: Any, context: Any) -> pb.ListEventsResponse:
        self._find(request, context)
        event = pb.Event(sequence=8, time_s=1.7e9, kind="node_joined", reason="node-b joined", node_id="node-b")
        return pb.ListEventsResponse(events=[event])

    def ListGenerations(self, request: Any, context: Any) -> pb.ListGenerationsResponse:
        self._find(request, context)
        summary = pb.GenerationSummary(generation=self.job.generation, steps=40, mean_gain=1.75, pause_s=0.5)
        return pb.ListGenerationsResponse(generations=[summary])

    def ListPoints(self, request: Any, context: Any) -> pb.ListPointsResponse:
        self._find(request, context)
        return pb.ListPointsResponse(time_s=[1.7e9], step=[40], tau=[66.0])


def _serve(servicer: ScriptedJobs) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_JobsServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
def controller() -> Iterator[tuple[ScriptedJobs, str]]:
    servicer = ScriptedJobs()
    server, endpoint = _serve(servicer)
    yield servicer, endpoint
    server.stop(None)


def _run(endpoint: str, *arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    environment = {"STRETTO_ENDPOINT": endpoint, "COLUMNS": "160", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["jobs", *arguments], env=environment)


def test_asks_for_what_its_methods_say(controller: tuple[ScriptedJobs, str]) -> None:
    servicer, endpoint = controller
    with JobsClient(endpoint) as client:
        assert [job.name for job in client.list()] == ["digits"]
        assert client.get("digits").phase == "running"
        client.scale("digits", 3)
        client.pause("digits")
        client.resume("digits")
        client.drain("digits", "node-b")
        client.checkpoint("digits")
        assert client.events("digits", after_sequence=7)[0].kind == "node_joined"
        assert client.generations("digits")[0].mean_gain == 1.75
        assert [*client.points("digits", after_s=5.0).tau] == [66.0]
        client.delete("digits")
    assert servicer.asked == [
        pb.GetJobRequest(job="digits"),
        pb.ScaleJobRequest(job="digits", nodes=3),
        pb.PauseJobRequest(job="digits"),
        pb.ResumeJobRequest(job="digits"),
        pb.DrainNodeRequest(job="digits", node_id="node-b"),
        pb.CheckpointJobRequest(job="digits"),
        pb.ListEventsRequest(job="digits", after_sequence=7),
        pb.ListGenerationsRequest(job="digits"),
        pb.ListPointsRequest(job="digits", after_s=5.0),
        pb.DeleteJobRequest(job="digits"),
    ]


def test_an_unknown_job_is_not_found_in_the_controllers_words(controller: tuple[ScriptedJobs, str]) -> None:
    with JobsClient(controller[1]) as client, pytest.raises(NotFound, match="no job 'other'; known: digits"):
        client.get("other")


def test_a_refused_request_is_fatal(controller: tuple[ScriptedJobs, str]) -> None:
    with JobsClient(controller[1]) as client, pytest.raises(Fatal, match="runs already"):
        client.create("digits", types_pb2.JobSpec(min_nodes=1))


def test_no_controller_says_which_endpoint_and_what_to_do() -> None:
    with JobsClient("127.0.0.1:1") as client, pytest.raises(Retry, match=r"127\.0\.0\.1:1.*stretto controller"):
        client.list()


def test_a_follower_is_passed_over_for_the_leader(controller: tuple[ScriptedJobs, str]) -> None:
    follower = ScriptedJobs()
    follower.unavailable = True
    server, endpoint = _serve(follower)
    with JobsClient(f"{endpoint},{controller[1]}") as client:
        client.get("digits")
        client.get("digits")
    server.stop(None)
    assert len(follower.asked) == 1, "the endpoint that answered is asked first from then on"
    assert len(controller[0].asked) == 2


def test_list_and_show_print_what_a_person_wants_to_know(controller: tuple[ScriptedJobs, str]) -> None:
    listed = _run(controller[1], "list")
    assert listed.exit_code == 0, listed.output
    for word in ("digits", "running", "1/2", "2000"):
        assert word in listed.output
    shown = _run(controller[1], "show", "digits")
    for word in ("node-a", "spare", "not connected", "node-b joined", "1 to 4 nodes"):
        assert word in shown.output


def test_json_has_every_field_under_its_wire_name(controller: tuple[ScriptedJobs, str]) -> None:
    shown = json.loads(_run(controller[1], "show", "digits", "--json").output)
    assert shown["desired_nodes"] == 2
    assert shown["progress_rate"] == 0.0
    assert [event["sequence"] for event in json.loads(_run(controller[1], "events", "digits", "--json").output)]
    generations = json.loads(_run(controller[1], "generations", "digits", "--json").output)
    assert generations[0]["mean_gain"] == 1.75


def test_commands_change_the_job(controller: tuple[ScriptedJobs, str]) -> None:
    servicer, endpoint = controller
    for arguments in (
        ("scale", "digits", "3"),
        ("pause", "digits"),
        ("resume", "digits"),
        ("drain", "digits", "node-b"),
        ("delete", "digits", "--yes"),
    ):
        assert _run(endpoint, *arguments).exit_code == 0
    assert servicer.asked[0].nodes == 3
    assert servicer.asked[3].node_id == "node-b"
    assert len(servicer.asked) == 5
    assert "node_joined" in _run(endpoint, "events", "digits").output


def test_errors_are_one_line_and_an_exit_code(controller: tuple[ScriptedJobs, str]) -> None:
    unknown = _run(controller[1], "show", "other")
    assert unknown.exit_code == 3
    assert unknown.output.count("\n") == 1
    assert "no job 'other'" in unknown.output
    assert _run("no:port:here", "list", "--endpoint", "host:0").exit_code == 2
