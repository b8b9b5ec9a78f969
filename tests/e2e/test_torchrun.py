"""Stock torchrun, and `stretto run`, against a real controller: processes are killed, nodes come and go."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from stretto.client import JobsClient

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path_factory.mktemp("controller")) as controller:
        yield controller


@pytest.fixture
def start(controller: ControllerProcess, tmp_path: Path) -> Callable[[str, str], Agents]:
    """Agents of a job of that name, for --nnodes."""

    def make(job: str, nnodes: str) -> Agents:
        return Agents(tmp_path / job, controller.grpc, job=job, nnodes=nnodes)

    return make


Start = Callable[[str, str], Agents]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def assert_ends_within(pid: int, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} still runs after {limit_s} s"
        time.sleep(0.01)


def test_a_plain_script_lives_through_killed_workers_killed_nodes_and_new_ones(start: Start) -> None:
    with start("plain", "1:3") as agents:
        for name in ("n0", "n1", "n2"):
            agents.torchrun(name, "allreduce.py")
        generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3)

        agents.kill_worker("n1")
        generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3, newer_than=generation)

        # n0 came first: nothing hangs on it.
        agents.kill_node("n0")
        generation = agents.wait_for_steps("n1", "n2", world_size=2, newer_than=generation)

        agents.torchrun("n3", "allreduce.py")
        agents.wait_for_steps("n1", "n2", "n3", world_size=3, newer_than=generation)


def test_a_killed_agents_orphan_ends_and_the_spare_steps_in(start: Start) -> None:
    with start("spare", "1:2") as agents:
        agents.torchrun("n0", "alone.py")
        agents.torchrun("n1", "alone.py")
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        agents.torchrun("n2", "alone.py")
        orphan = agents.worker_pid("n0")
        _wait_until_spare(agents, "n2")

        agents.signal("n0", signal.SIGKILL)
        assert_ends_within(orphan, 1.0)
        agents.wait_for_steps("n1", "n2", world_size=2, newer_than=generation)


def test_torchrun_ends_well_when_its_node_is_drained_and_says_so_when_it_is_told_to_go(
    start: Start, controller: ControllerProcess
) -> None:
    with start("drained", "1:2") as agents, JobsClient(controller.grpc) as client:
        agents.torchrun("n0", "alone.py")
        agents.torchrun("n1", "alone.py")
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        client.drain("drained", _node_id(agents, "n0"))
        assert agents.exit_code("n0") == 0, agents.output("n0")
        generation = agents.wait_for_steps("n1", world_size=1, newer_than=generation)

        agents.signal("n1", signal.SIGTERM)
        # torch's agent ends with 1 after a signal.
        assert agents.exit_code("n1") == 1
        assert [node.state for node in client.get("drained").nodes] == []


def _node_id(agents: Agents, name: str) -> str:
    """What the worker of an agent finds in its environment."""
    environment = Path(f"/proc/{agents.worker_pid(name)}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in environment if "=" in entry)["STRETTO_NODE"]


def _wait_until_spare(agents: Agents, name: str) -> None:
    """Its agent waits for a place: it has said so, and its workers have written nothing."""
    deadline_s = time.monotonic() + 30
    while "waits as a spare" not in agents.output(name):
        assert time.monotonic() < deadline_s, agents.output(name)
        time.sleep(0.05)
    assert all(row.node != name for row in agents.rows())


def test_unequal_slots_get_ranks_without_gaps_and_all_agents_end_well(start: Start) -> None:
    with start("slots", "2") as agents:
        agents.torchrun("one", "allreduce.py", "5")
        agents.torchrun("two", "allreduce.py", "5", slots=2)
        assert [agents.exit_code("one"), agents.exit_code("two")] == [0, 0], agents.output("one")
        assert {row.rank for row in agents.rows()} == {0, 1, 2}
        assert {row.world_size for row in agents.rows()} == {3}
        assert len({row.rank for row in agents.rows() if row.node == "two"}) == 2


def test_survivors_outlive_another_nodes_death_without_any_restarts_allowed(start: Start) -> None:
    with start("survivors", "1:3") as agents:
        for name in ("n0", "n1", "n2"):
            agents.stretto_run(name, "allreduce.py", max_restarts=0)
        generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3)
        agents.kill_node("n2")
        generation = agents.wait_for_steps("n0", "n1", world_size=2, newer_than=generation)
        assert {row.restarts for row in agents.rows()} == {0}

        # Its own worker's death does count; the other's then does not.
        agents.kill_worker("n1")
        assert agents.exit_code("n1") == 1
        assert "Signal 9 (SIGKILL)" in agents.output("n1")
        agents.wait_for_steps("n0", world_size=1, newer_than=generation)


def test_nodes_of_stretto_run_that_are_told_to_go_exit_with_0(start: Start) -> None:
    with start("drain", "1:2") as agents:
        agents.stretto_run("n0", "alone.py")
        agents.stretto_run("n1", "alone.py")
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        agents.stretto_run("spare", "alone.py")
        _wait_until_spare(agents, "spare")

        agents.signal("spare", signal.SIGTERM)
        assert agents.exit_code("spare") == 0, agents.output("spare")
        agents.signal("n0", signal.SIGTERM)
        assert agents.exit_code("n0") == 0, agents.output("n0")
        agents.wait_for_steps("n1", world_size=1, newer_than=generation)


def test_failures_of_its_own_are_counted_and_end_in_torchs_report(start: Start) -> None:
    with start("failing", "1") as agents:
        agents.stretto_run("n0", "alone.py", "0.1", "7", max_restarts=1)
        assert agents.exit_code("n0") == 1
        assert {row.restarts for row in agents.rows()} == {0, 1}
        assert "exitcode  : 7" in agents.output("n0")


def test_a_spec_that_differs_is_refused_in_the_controllers_words(start: Start, controller: ControllerProcess) -> None:
    with start("spec", "1") as agents:
        agents.stretto_run("n0", "alone.py")
        agents.wait_for_steps("n0", world_size=1)
        with Agents(agents.directory, controller.grpc, job="spec", nnodes="1:2") as others:
            others.torchrun("n1", "alone.py")
            assert others.exit_code("n1") == 1
            assert "max_nodes is 2 here, but the job runs with max_nodes 1" in others.output("n1")


def test_without_an_endpoint_a_controller_comes_and_goes_with_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Agents(tmp_path / "logs", "", job="own", nnodes="1") as agents:
        agents.stretto_run("n0", "alone.py")
        agents.wait_for_steps("n0", world_size=1)
        assert "/metrics" in agents.output("n0")
        embedded = _listener_of(tmp_path)
        worker = agents.worker_pid("n0")
        agents.signal("n0", signal.SIGKILL)
        assert_ends_within(worker, 2.0)
        assert_ends_within(embedded, 2.0)

        # Started again under the same name: the record of the killed run is no obstacle.
        agents.stretto_run("n1", "alone.py", "0.1")
        assert agents.exit_code("n1") == 0, agents.output("n1")
        assert not alive(_listener_of(tmp_path))
    generations = {row.node: row.generation for row in agents.rows()}
    assert generations["n1"] > generations["n0"]


def _listener_of(directory: Path) -> int:
    ready = json.loads((directory / ".stretto" / "run" / "own" / "ready.json").read_text())
    assert ready["pid"] != os.getpid()
    return int(ready["pid"])
