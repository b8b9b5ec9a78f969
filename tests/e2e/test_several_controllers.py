"""Several controllers on a real etcd: one leads, the others say who, and whatever dies, jobs go on."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.controller import ControllerProcess
from harness.controllers import SPEC, Agent, Controllers, eventually, readiness
from harness.etcd import EtcdCluster
from harness.line import Line
from stretto.client import JobsClient
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import types_pb2 as types
from stretto_proto.v1.jobs_pb2_grpc import JobsStub

pytestmark = pytest.mark.e2e
WAIT_S = 60.0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


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


def test_a_leader_that_alone_is_cut_off_from_etcd_gives_way_though_agents_reach_it(tmp_path: Path) -> None:
    with (
        EtcdCluster(tmp_path / "etcd") as etcd,
        Line(etcd.endpoint(0)) as first,
        Line(etcd.endpoint(0)) as second,
        Controllers(tmp_path, etcd, 2, each_by=(first.endpoint, second.endpoint)) as controllers,
        Agent(controllers.endpoints) as agent,
        JobsClient(controllers.endpoints) as client,
    ):
        agent.comes_to(1)
        cut_off = controllers.leader()
        line = (first, second)[controllers.each.index(cut_off)]
        line.cut()
        leader = controllers.leader(but=cut_off)
        assert eventually(lambda: client.scale("a", 2)).desired_nodes == 2
        agent.connects_to(2)
        agent.ready()
        agent.comes_to(2)
        assert "does not lead any more" in cut_off.log
        line.heal()
        # It follows again.
        eventually(lambda: leader.grpc in str(readiness(cut_off)))
        assert [each.generation.number for each in client.generations("a")] == [1, 2]
        assert agent.generations == [1, 2]


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
