"""A real `stretto controller`: bad input changes nothing, kill -9 loses nothing, signals end it well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.controller import ControllerProcess
from harness.raw import RawNode, RawStream, RawWorker
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import types_pb2 as types
from stretto_proto.v1.jobs_pb2_grpc import JobsStub

pytestmark = pytest.mark.e2e


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path) as controller:
        yield controller


@pytest.fixture
def channel(controller: ControllerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(controller.grpc) as channel:
        yield channel


def eventually(check: Callable[[], bool], limit_s: float = 10.0) -> float:
    """Seconds until the check holds."""
    started_s = time.monotonic()
    while not check():
        assert time.monotonic() - started_s < limit_s, "it did not come true in time"
        time.sleep(0.005)
    return time.monotonic() - started_s


def connected(controller: ControllerProcess, job: str = "a") -> dict[str, bool]:
    return {node["node_id"]: node["connected"] for node in controller.get(f"/api/v1/jobs/{job}")["nodes"]}


def pair(controller: ControllerProcess) -> tuple[RawNode, RawNode]:
    """Two nodes that run in generation 1 of job a."""
    nodes = tuple(RawNode(controller.grpc, "a", f"n{i}", min_nodes=2, max_nodes=2) for i in range(2))
    for node in nodes:
        node.connect(ready=True)
    assert [node.assignment().number for node in nodes] == [1, 1]
    return nodes[0], nodes[1]


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details() or ""


def ended(stream: RawStream) -> tuple[grpc.StatusCode, str]:
    assert stream.next() is None
    code, message = stream.status()
    return code, message or ""


def durable(controller: ControllerProcess) -> Any:
    """The job, without what time alone changes."""
    job = controller.get("/api/v1/jobs/a")
    for node in job["nodes"]:
        del node["silent_s"], node["connected"]
    return job


class TestBadInput:
    """One clear error each; the job is what it was; the controller lives."""

    @pytest.fixture(scope="class")
    @classmethod
    def controller(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
        """One for all of them, with a running job whose nodes need no heartbeats."""
        limits = {"STRETTO_LIMITS_MISSED_HEARTBEATS": "1000"}
        with ControllerProcess(tmp_path_factory.mktemp("controller"), **limits) as controller:
            nodes = pair(controller)
            yield controller
            del nodes

    @pytest.fixture(autouse=True)
    def nothing_changes(self, controller: ControllerProcess) -> Iterator[None]:
        before = durable(controller)
        events = controller.get("/api/v1/jobs/a/events")
        yield
        assert controller.alive()
        assert durable(controller) == before
        assert controller.get("/api/v1/jobs/a/events") == events
        assert [job["name"] for job in controller.get("/api/v1/jobs")["jobs"]] == ["a"]
        assert connected(controller) == {"n0": True, "n1": True}
        assert "Traceback" not in controller.log

    def test_unknown_job_name(self, channel: grpc.Channel) -> None:
        stub = JobsStub(channel)
        for call in (
            lambda: stub.GetJob(jobs.GetJobRequest(job="nobody")),
            lambda: stub.ScaleJob(jobs.ScaleJobRequest(job="nobody", nodes=2)),
            lambda: stub.DeleteJob(jobs.DeleteJobRequest(job="nobody")),
            lambda: stub.ListEvents(jobs.ListEventsRequest(job="nobody")),
        ):
            code, message = refused(call)
            assert code is grpc.StatusCode.NOT_FOUND
            assert "no job" in message
            assert "nobody" in message

    def test_unknown_job_of_a_worker(self, controller: ControllerProcess) -> None:
        with RawWorker(controller.grpc, "nobody", "n0", 0, 1) as worker:
            code, message = ended(worker.open())
        assert code is grpc.StatusCode.NOT_FOUND
        assert "no job nobody" in message

    def test_name_that_no_job_can_have(self, channel: grpc.Channel) -> None:
        request = jobs.CreateJobRequest(job="Not_A_Label", spec=types.JobSpec(min_nodes=1, max_nodes=1))
        code, message = refused(lambda: JobsStub(channel).CreateJob(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "job is 'Not_A_Label'; a job's name is a DNS label" in message

    def test_min_above_max(self, controller: ControllerProcess, channel: grpc.Channel) -> None:
        request = jobs.CreateJobRequest(job="b", spec=types.JobSpec(min_nodes=3, max_nodes=2))
        code, message = refused(lambda: JobsStub(channel).CreateJob(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message == "min_nodes is 3 and max_nodes is 2; give min_nodes <= max_nodes"
        with RawNode(controller.grpc, "b", "n0", min_nodes=3, max_nodes=2) as node:
            stream = node.open()
            stream.send(node.hello(ready=True))
            assert ended(stream) == (code, message)

    def test_second_spec_under_the_name_of_a_running_job(self, controller: ControllerProcess) -> None:
        with RawNode(controller.grpc, "a", "n7", min_nodes=1, max_nodes=5) as node:
            stream = node.open()
            stream.send(node.hello(ready=True))
            code, message = ended(stream)
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "min_nodes is 1 here, but the job runs with min_nodes 2" in message

    def test_node_that_claims_another_s_id(self, controller: ControllerProcess) -> None:
        with RawNode(controller.grpc, "a", "n0", min_nodes=2, max_nodes=2) as thief:
            thief.key = "another agent's secret"
            stream = thief.open()
            stream.send(thief.hello(ready=True))
            code, message = ended(stream)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "node id n0 belongs to another agent" in message
        assert thief.key not in controller.log

    def test_malformed_protobuf(self, channel: grpc.Channel) -> None:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/stretto.v1.Jobs/GetJob")
        code, message = refused(lambda: unary(b"\xff\xff\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "the request of 3 bytes is not a message of /stretto.v1.Jobs/GetJob" in message
        for method in ("/stretto.v1.Rendezvous/Attend", "/stretto.v1.Training/Train"):
            stream = RawStream(channel.stream_stream(method))
            stream.send(b"\x0a\xff\xff")
            code, message = ended(stream)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert f"the request of 3 bytes is not a message of {method}" in message

    def test_message_of_10_megabytes(self, controller: ControllerProcess, channel: grpc.Channel) -> None:
        code, message = refused(lambda: JobsStub(channel).GetJob(jobs.GetJobRequest(job="x" * 10_000_000)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in message
        with RawNode(controller.grpc, "a", "n7") as node:
            node.node_id = "n" * 10_000_000
            stream = node.open()
            stream.send(node.hello())
            assert ended(stream)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_stream_that_does_not_begin_with_hello(self, controller: ControllerProcess) -> None:
        with RawNode(controller.grpc, "a", "n7") as node:
            stream = node.open()
            stream.send(rendezvous.AttendRequest(heartbeat=rendezvous.NodeHeartbeat()))
            code, message = ended(stream)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message == "the first message is heartbeat; a stream begins with hello"

    def test_other_protocol_version(self, controller: ControllerProcess) -> None:
        with RawNode(controller.grpc, "a", "n7") as node:
            stream = node.open()
            stream.send(node.hello(version=2))
            code, message = ended(stream)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "protocol_version is 2; this controller speaks 1" in message


def test_a_silent_stream_and_a_flood_are_ended(tmp_path: Path) -> None:
    limits = {"STRETTO_SERVICE_FIRST_MESSAGE_S": "0.3", "STRETTO_SERVICE_STREAM_MESSAGES_BURST": "20"}
    with ControllerProcess(tmp_path, **limits) as controller:
        with RawNode(controller.grpc, "a", "n0") as node:
            code, message = ended(node.open())
            # One that may try again: the hello of an honest node may wait unread where the controller is late.
            assert code is grpc.StatusCode.UNAVAILABLE
            assert message == "no hello came within 0.3 s; connect again"
            node.connect()
            for _ in range(500):
                node.say(heartbeat=rendezvous.NodeHeartbeat())
            assert node.stream is not None
            code, message = ended(node.stream)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "more than 100 messages a second" in message
        assert controller.alive()


def test_kill_9_and_restart_keep_generation_and_members(controller: ControllerProcess) -> None:
    n0, n1 = pair(controller)
    before = durable(controller)
    controller.restart()
    assert durable(controller) == before
    assert connected(controller) == {"n0": False, "n1": False}
    for node in (n0, n1):
        node.connect()
    with RawWorker(controller.grpc, "a", "n1", 1, generation=1) as worker:
        answer = worker.connect(base_batch_size=16, batch_size=16, target_tau=10)
        assert answer.welcome.scale == 2.0
    after = controller.get("/api/v1/jobs/a")
    assert (after["phase"], after["generation"]["number"]) == ("running", 1)
    assert after["generation"]["members"] == ["n0", "n1"]
    # Longer than three missed heartbeats would be: the members that came back are members still.
    deadline = time.monotonic() + 4.0
    while time.monotonic() < deadline:
        for node in (n0, n1):
            node.say(heartbeat=rendezvous.NodeHeartbeat(generation=1))
        time.sleep(0.5)
    assert controller.get("/api/v1/jobs/a")["generation"]["number"] == 1


def test_an_assignment_that_was_sent_is_remembered_whenever_the_kill_comes(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path) as controller:
        for generation in range(1, 4):
            node = RawNode(controller.grpc, f"job-{generation}", "n0")
            node.connect(ready=True)
            assigned = node.assignment()
            controller.restart()
            job = controller.get(f"/api/v1/jobs/job-{generation}")
            assert job["generation"]["number"] == assigned.number
            assert job["generation"]["members"] == ["n0"]


_AGENT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from harness.raw import RawNode
node = RawNode(sys.argv[1], "a", "n0")
node.connect(ready=True)
node.assignment()
print("assigned", flush=True)
time.sleep(60)
"""


def test_a_killed_client_s_stream_is_closed_within_milliseconds(controller: ControllerProcess) -> None:
    tests = str(Path(__file__).parents[1])
    agent = subprocess.Popen([sys.executable, "-c", _AGENT, controller.grpc, tests], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "assigned\n"
    assert connected(controller) == {"n0": True}
    agent.kill()
    took_s = eventually(lambda: not connected(controller).get("n0", False))
    agent.wait()
    agent.stdout.close()
    # Some ms in truth; the rest is for a busy machine.
    assert took_s < 0.5


def test_a_stream_that_ends_in_any_way_is_closed_once(controller: ControllerProcess) -> None:
    with RawNode(controller.grpc, "a", "n0") as node:
        for end in ("half_close", "cancel"):
            node.connect()
            assert node.stream is not None
            getattr(node.stream, end)()
            eventually(lambda: connected(controller) == {"n0": False})
        node.connect()
        assert connected(controller) == {"n0": True}
    assert "Traceback" not in controller.log


def test_sigterm_ends_it_well_and_tells_its_streams(controller: ControllerProcess) -> None:
    n0, n1 = pair(controller)
    assert controller.stop() == 0
    for node in (n0, n1):
        assert node.stream is not None
        code, message = ended(node.stream)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in message
    assert "Traceback" not in controller.log
    controller.start()
    assert controller.get("/api/v1/jobs/a")["phase"] == "running", "the stop itself evicts nobody"


def test_sigint_ends_it_well_with_a_page_open(controller: ControllerProcess) -> None:
    pair(controller)
    events = urllib.request.urlopen(f"{controller.http}/api/v1/jobs/a/events", timeout=10)
    assert events.readline().startswith((b"id:", b"event:", b"data:"))
    os.kill(controller.pid, signal.SIGINT)
    eventually(lambda: not controller.alive())
    events.close()
    assert controller.stop() == 0


def test_events_are_streamed_as_they_happen(controller: ControllerProcess, channel: grpc.Channel) -> None:
    pair(controller)
    seen = controller.get("/api/v1/jobs/a/events")["events"][-1]["sequence"]
    request = urllib.request.Request(f"{controller.http}/api/v1/jobs/a/events", headers={"Last-Event-ID": str(seen)})
    with urllib.request.urlopen(request, timeout=10) as events:
        JobsStub(channel).PauseJob(jobs.PauseJobRequest(job="a"))
        data = next(line for line in events if line.startswith(b"data:"))
    event = json.loads(data.removeprefix(b"data:"))
    assert event["sequence"] == seen + 1
    assert "pause" in event["reason"]


def test_a_failed_save_ends_the_controller_with_an_error(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path, STRETTO_SERVICE_FAILURE_SHOWN_S="3") as controller:
        pair(controller)
        database = tmp_path / "data" / "controller.sqlite3"
        # The next save finds its table gone, as it would find its disk full.
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sqlite3; sqlite3.connect({str(database)!r}).executescript('DROP TABLE jobs')",
            ],
            check=True,
        )
        with grpc.insecure_channel(controller.grpc) as channel:
            code, message = refused(lambda: JobsStub(channel).PauseJob(jobs.PauseJobRequest(job="a")))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "cannot save" in message
        with pytest.raises(urllib.error.HTTPError) as not_ready:
            controller.get("/readyz")
        assert not_ready.value.code == 503
        assert "cannot save" in not_ready.value.read().decode()
        with urllib.request.urlopen(f"{controller.http}/metrics", timeout=5) as metrics:
            assert b"stretto_controller_store_errors_total 1.0" in metrics.read()
        assert controller.stop() == 1
        assert "a decision was not saved and is not acted upon" in controller.log


def test_a_second_controller_says_what_is_in_its_way(controller: ControllerProcess, tmp_path: Path) -> None:
    def run(*options: str) -> str:
        stretto = str(Path(sys.executable).with_name("stretto"))
        done = subprocess.run(
            [stretto, "controller", *options], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    grpc_port, http_port = controller.grpc.rsplit(":", 1)[1], controller.http.rsplit(":", 1)[1]
    free, other = ("--grpc-port", "0", "--http-port", "0"), ("--data-dir", str(tmp_path / "other"))
    in_use = run("--data-dir", str(controller.data_dir), *free)
    assert f"in use by another controller (process {controller.pid})" in in_use
    assert f"cannot serve gRPC on 127.0.0.1:{grpc_port}" in run("--grpc-port", grpc_port, "--http-port", "0", *other)
    assert f"cannot serve HTTP on 127.0.0.1:{http_port}" in run("--grpc-port", "0", "--http-port", http_port, *other)
    assert "give --tls-cert, --tls-key and --tokens" in run("--host", "0.0.0.0", *free, *other)
    assert "cannot read the tokens file" in run("--tokens", str(tmp_path / "none"), *free, *other)
    assert "cannot serve TLS" in run("--tls-cert", str(tmp_path), "--tls-key", str(tmp_path), *free, *other)
    assert "grpc_port is 70000; it must be between" in run("--grpc-port", "70000", *other)
    config = tmp_path / "stretto.toml"
    config.write_text(
        textwrap.dedent("""
        [limits]
        settle_s = -1
    """)
    )
    assert "settle_s is -1.0; it must be above 0" in run("--config", str(config), *free, *other)


def test_health_and_reflection_are_served(channel: grpc.Channel) -> None:
    check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
    # HealthCheckRequest.service is field 1; SERVING is 1 in field 1 of the answer.
    name = b"stretto.v1.Rendezvous"
    assert check(b"\x0a" + bytes([len(name)]) + name) == b"\x08\x01"
    reflection = RawStream(channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"))
    # list_services is field 7.
    reflection.send(b"\x3a\x00")
    services = reflection.next()
    for service in (b"stretto.v1.Rendezvous", b"stretto.v1.Training", b"stretto.v1.Jobs", b"grpc.health.v1.Health"):
        assert service in services
    reflection.half_close()
