"""Several controllers on a real etcd: one leads, the others say who, and whatever dies, jobs go on."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.controller import ControllerProcess
from harness.etcd import EtcdCluster
from stretto.client import JobsClient
from stretto.errors import Retry
from stretto.stream import ReconnectingStream, StreamSettings
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import types_pb2 as types
from stretto_proto.v1.jobs_pb2_grpc import JobsStub
from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousStub

pytestmark = pytest.mark.e2e
WAIT_S = 60.0
SPEC = types.JobSpec(min_nodes=1, max_nodes=3, mode=types.RECONFIGURE_MODE_RESTART)


def eventually(check: Callable[[], Any]) -> Any:
    """What `check` gives, once it gives something; a controller that is away counts as not yet."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            found = check()
        except (OSError, Retry):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.02)


class Controllers:
    """Controllers that share one etcd."""

    def __init__(self, directory: Path, etcd: EtcdCluster, count: int, **environment: str) -> None:
        self.etcd = etcd
        self.each = [
            ControllerProcess(
                directory / f"controller{number}",
                STRETTO_STORE="etcd",
                STRETTO_ETCD_ENDPOINTS=etcd.endpoints,
                STRETTO_SERVICE_STOP_GRACE_S="0.2",
                **environment,
            )
            for number in range(count)
        ]
        for controller in self.each:
            controller.directory.mkdir()

    def __enter__(self) -> Controllers:
        for controller in self.each:
            controller.launch()
        for controller in self.each:
            controller.await_serving()
        return self

    def __exit__(self, *_: object) -> None:
        for controller in self.each:
            if controller.alive():
                controller.signal(signal.SIGCONT)
                controller.kill()

    @property
    def endpoints(self) -> str:
        return ",".join(controller.grpc for controller in self.each)

    def leader(self, *, but: ControllerProcess | None = None) -> ControllerProcess:
        """The controller that says it is ready; `but` is not asked, it may be frozen."""

        def found() -> ControllerProcess | None:
            asked = [each for each in self.each if each is not but and each.alive()]
            return next((each for each in asked if readiness(each)[0] == 200), None)

        leader: ControllerProcess = eventually(found)
        return leader


def readiness(controller: ControllerProcess, path: str = "/readyz") -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of a GET."""
    try:
        with urllib.request.urlopen(f"{controller.http}{path}", timeout=5) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), {name.lower(): value for name, value in error.headers.items()}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


class Agent:
    """A node of job a on the worker library's own stream, which knows every controller; keeps what it is told."""

    def __init__(self, endpoints: str, node_id: str = "n0") -> None:
        self.node_id = node_id
        self.generations: list[int] = []
        self.welcomes: list[str] = []
        self.fatal: list[Exception] = []
        self._news = threading.Condition()
        self._request_id, self._generation, self._answered = 1, 0, False
        self._stream: ReconnectingStream[Any, Any] = ReconnectingStream(
            endpoints.split(","),
            lambda channel, requests: RendezvousStub(channel).Attend(requests),
            self._hello,
            self._on_message,
            on_fatal=self.fatal.append,
            settings=StreamSettings(max_backoff_s=0.5),
        )
        self._stream.start()
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._stream.close()

    def ready(self) -> None:
        """Its workers have ended: a new generation, please."""
        with self._news:
            self._request_id += 1
            self._answered = False
        self._stream.send(rendezvous.AttendRequest(ready=self._request()))

    def comes_to(self, generation: int) -> None:
        with self._news:
            came = self._news.wait_for(lambda: generation in self.generations or self.fatal, WAIT_S)
        assert came
        assert not self.fatal, self.fatal

    def connects_to(self, count: int) -> None:
        """Wait until that many connections have been welcomed."""
        eventually(lambda: len(self.welcomes) >= count)

    def _request(self) -> rendezvous.NodeReady:
        return rendezvous.NodeReady(request_id=self._request_id, generation=self._generation, restarts_left=-1)

    def _hello(self) -> list[rendezvous.AttendRequest]:
        hello = rendezvous.NodeHello(
            protocol_version=1,
            job="a",
            node_id=self.node_id,
            node_key=f"key-of-{self.node_id}-and-longer",
            slots=1,
            address="127.0.0.1",
            spec=SPEC,
            generation=self._generation if self._answered else 0,
        )
        if not self._answered:
            hello.ready.CopyFrom(self._request())
        return [rendezvous.AttendRequest(hello=hello)]

    def _on_message(self, message: rendezvous.AttendResponse) -> None:
        with self._news:
            if message.HasField("welcome"):
                self.welcomes.append(message.welcome.controller_id)
            elif message.HasField("assignment") and message.assignment.request_id == self._request_id:
                self._generation = message.assignment.generation.number
                self._answered = True
                self.generations.append(self._generation)
            self._news.notify_all()

    def _beat(self) -> None:
        while not self._stop.wait(0.5):
            beat = rendezvous.NodeHeartbeat(generation=self._generation)
            self._stream.send(rendezvous.AttendRequest(heartbeat=beat), latest_of="heartbeat")


@pytest.fixture
def pair(tmp_path: Path, etcd: EtcdCluster, request: pytest.FixtureRequest) -> Iterator[Controllers]:
    with Controllers(tmp_path, etcd, 2, STRETTO_ETCD_PREFIX=f"/{request.node.name}/") as controllers:
        yield controllers


def test_followers_say_who_leads(pair: Controllers) -> None:
    leader = pair.leader()
    (follower,) = [each for each in pair.each if each is not leader]
    status, body, _ = eventually(lambda: leader.grpc in str(readiness(follower)) and readiness(follower))
    assert (status, body["status"]) == (503, "not ready")
    status, body, headers = readiness(follower, "/api/v1/jobs")
    assert (status, body["type"]) == (503, "urn:stretto:problem:unavailable")
    assert leader.grpc in body["detail"]
    assert headers["stretto-leader"] == leader.http
    assert readiness(follower, "/healthz")[0] == 200
    with grpc.insecure_channel(follower.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        JobsStub(channel).ListJobs(jobs.ListJobsRequest(), timeout=WAIT_S)
    error: Any = refused.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert leader.grpc in error.details()
    metadata = dict(error.trailing_metadata())
    assert types.Leader.FromString(metadata["stretto-leader-bin"]).grpc_address == leader.grpc
    for controller, leads in ((leader, "1.0"), (follower, "0.0")):
        with urllib.request.urlopen(f"{controller.http}/metrics", timeout=10) as response:
            assert f"stretto_controller_leader {leads}" in response.read().decode()


def test_a_client_that_knows_only_a_follower_is_led_to_the_leader(pair: Controllers) -> None:
    leader = pair.leader()
    (follower,) = [each for each in pair.each if each is not leader]
    eventually(lambda: leader.grpc in str(readiness(follower)))
    with JobsClient(follower.grpc) as client:
        client.create("a", SPEC)
        assert [job.name for job in client.list()] == ["a"]
    with Agent(follower.grpc, "n0") as agent:
        agent.comes_to(1)


def test_a_job_goes_on_when_its_leader_is_killed(pair: Controllers) -> None:
    with Agent(pair.endpoints) as agent, JobsClient(pair.endpoints) as client:
        agent.comes_to(1)
        leader = pair.leader()
        leader.kill()
        pair.leader()
        eventually(lambda: client.scale("a", 2).desired_nodes == 2)
        agent.connects_to(2)
        agent.ready()
        agent.comes_to(2)
        leader.start()
        assert readiness(leader)[0] == 503
        numbers = [each.generation.number for each in client.generations("a")]
        assert numbers == [1, 2]


def test_a_leader_that_stops_lets_another_lead_at_once_and_nothing_is_forgotten(pair: Controllers) -> None:
    first = pair.leader()
    with JobsClient(pair.endpoints) as client:
        client.create("a", SPEC)
        assert first.stop() == 0
        pair.leader()
        assert eventually(lambda: client.scale("a", 3)).desired_nodes == 3
        first.start()
        second = pair.leader()
        assert second is not first
        second.kill()
        pair.leader()
        assert eventually(lambda: client.get("a")).desired_nodes == 3


def test_a_leader_that_was_frozen_finds_that_it_does_not_lead(pair: Controllers) -> None:
    with Agent(pair.endpoints) as agent, JobsClient(pair.endpoints) as client:
        agent.comes_to(1)
        frozen = pair.leader()
        frozen.signal(signal.SIGSTOP)
        leader = pair.leader(but=frozen)
        agent.connects_to(2)
        agent.ready()
        agent.comes_to(2)
        frozen.signal(signal.SIGCONT)
        # It answers again, as a follower.
        eventually(lambda: leader.grpc in str(readiness(frozen)))
        assert [each.generation.number for each in client.generations("a")] == [1, 2]
        assert agent.generations == [1, 2]
        assert "does not lead any more" in frozen.log


def test_a_leader_that_is_cut_off_from_etcd_stops_and_leads_again_when_etcd_is_back(tmp_path: Path) -> None:
    with (
        EtcdCluster(tmp_path / "etcd") as etcd,
        Controllers(tmp_path, etcd, 2) as controllers,
        Agent(controllers.endpoints) as agent,
    ):
        agent.comes_to(1)
        leader = controllers.leader()
        etcd.kill(0)
        eventually(lambda: "does not lead any more" in leader.log)
        eventually(lambda: all(readiness(each)[0] == 503 for each in controllers.each))
        etcd.start(0)
        etcd.await_healthy()
        etcd.compact()
        controllers.leader()
        agent.connects_to(2)
        agent.ready()
        agent.comes_to(2)


def test_training_goes_on_when_etcd_s_own_leader_is_killed(tmp_path: Path) -> None:
    with (
        EtcdCluster(tmp_path / "etcd", 3) as etcd,
        Controllers(tmp_path, etcd, 2) as controllers,
        Agent(controllers.endpoints) as agent,
        JobsClient(controllers.endpoints) as client,
    ):
        agent.comes_to(1)
        killed = etcd.leader()
        etcd.kill(killed)
        agent.ready()
        agent.comes_to(2)
        etcd.start(killed)
        etcd.await_healthy()
        assert eventually(lambda: client.scale("a", 2)).desired_nodes == 2
        assert [each.generation.number for each in eventually(lambda: client.generations("a"))] == [1, 2]


def test_a_controller_whose_etcd_refuses_it_says_why_at_its_start(tmp_path: Path, etcd: EtcdCluster) -> None:
    (tmp_path / "password").write_text("secret-word")
    controller = ControllerProcess(
        tmp_path,
        STRETTO_STORE="etcd",
        STRETTO_ETCD_ENDPOINTS=etcd.endpoints,
        STRETTO_ETCD_USER="root",
        STRETTO_ETCD_PASSWORD_FILE=str(tmp_path / "password"),
    )
    with pytest.raises(AssertionError, match="ended at its start"):
        controller.start()
    assert "authentication is not enabled" in controller.log
    assert "secret-word" not in controller.log
