"""Agents in in-process mode against a real controller: whom they start, whom they end, and how they end themselves."""

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

IN_PROCESS = "reconfigure=in-process"
PATIENCE_S = 60.0


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


def node_id(agents: Agents, name: str) -> str:
    """What the worker of an agent finds in its environment."""
    environment = Path(f"/proc/{agents.worker_pid(name)}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in environment if "=" in entry)["STRETTO_NODE"]


def wait_for_output(agents: Agents, name: str, words: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while words not in agents.output(name):
        assert time.monotonic() < deadline_s, agents.output(name)
        time.sleep(0.05)


def test_a_plain_script_is_refused_at_once_and_told_what_to_do(start: Start, controller: ControllerProcess) -> None:
    with start("plain", "1:3") as agents, JobsClient(controller.grpc) as client:
        agents.torchrun("n0", "allreduce.py", "3", slots=2, max_restarts=0, conf=IN_PROCESS)
        assert agents.exit_code("n0") == 1
        output = agents.output("n0")
        assert "ValueError: invalid literal for int() with base 10: 'none: the job reconfigures in process" in output
        assert "start with --rdzv-conf=reconfigure=restart (stretto run: --reconfigure restart)" in output
        assert agents.rows() == []
        assert client.get("plain").phase == "failed"

        # It does as it was told; the failed job's name is no obstacle.
        agents.torchrun("n1", "allreduce.py", "3")
        assert agents.exit_code("n1") == 0, agents.output("n1")


def test_stretto_run_tells_a_plain_script_which_option_to_give(start: Start) -> None:
    with start("plain-run", "1:3") as agents:
        agents.stretto_run("n0", "allreduce.py", "3", reconfigure=None)
        assert agents.exit_code("n0") == 1
        assert "(stretto run: --reconfigure restart)" in agents.output("n0")


def test_a_script_that_ignores_stretto_is_named_while_it_runs_and_is_no_success(
    start: Start, controller: ControllerProcess
) -> None:
    with start("ignorant", "1:3") as agents, JobsClient(controller.grpc) as client:
        agents.torchrun("n0", "ignorant.py", "3", slots=2, max_restarts=0, conf=f"{IN_PROCESS},sign_in_warning=0.5")
        wait_for_output(agents, "n0", "workers 0, 1 of this node began no session with the controller within")
        assert agents.exit_code("n0") == 1
        assert "exited with 0, but did not take part: workers 0, 1 of this node ended without" in agents.output("n0")
        job = client.get("ignorant")
        assert job.phase == "failed"
        events = client.events("ignorant")
        assert any("ended without a session" in event.reason for event in events), events


def test_workers_that_hang_at_the_start_are_ended_and_count_as_failed(start: Start) -> None:
    with start("stuck", "1:3") as agents:
        agents.torchrun("n0", "ignorant.py", "3600", slots=2, max_restarts=0, conf=f"{IN_PROCESS},sign_in_limit=0.5")
        wait_for_output(agents, "n0", "workers 0, 1 of this node hung at the start, for")
        assert agents.exit_code("n0") == 1
        assert agents.left_over() == []


def test_a_stopped_worker_is_killed_on_the_controllers_word_and_counts_as_nobodys_failure(start: Start) -> None:
    with start("hung", "1:2") as agents:
        agents.torchrun("n0", "raw_live.py", max_restarts=0, conf=IN_PROCESS)
        agents.stretto_run("n1", "raw_live.py", max_restarts=0, reconfigure=None)
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        for name in ("n0", "n1"):
            hung = agents.worker_pid(name)
            os.kill(hung, signal.SIGSTOP)
            generation = agents.wait_for_steps("n0", "n1", world_size=2, newer_than=generation)
            assert agents.worker_pid(name) != hung
            assert not Path(f"/proc/{hung}").exists()
        assert {row.restarts for row in agents.rows()} == {0}


def test_a_crashed_worker_takes_its_siblings_along_and_no_other_nodes(start: Start) -> None:
    with start("siblings", "1:2") as agents:
        agents.torchrun("n0", "raw_live.py", slots=2, conf=IN_PROCESS)
        agents.torchrun("n1", "raw_live.py", conf=IN_PROCESS)
        generation = agents.wait_for_steps("n0", "n1", world_size=3)
        before = {row.pid: row.node for row in agents.rows()}
        agents.kill_worker("n0")
        newer = agents.wait_for_steps("n0", "n1", world_size=3, newer_than=generation)
        after = {row.pid: row.node for row in agents.rows() if row.generation == newer}
        assert [node for pid, node in after.items() if pid in before] == ["n1"]


def test_agents_whose_workers_are_done_exit_with_0_and_so_do_spares(
    start: Start, controller: ControllerProcess
) -> None:
    with start("done", "1:2") as agents, JobsClient(controller.grpc) as client:
        agents.torchrun("n0", "raw_live.py", slots=2, conf=IN_PROCESS)
        agents.stretto_run("n1", "raw_live.py", reconfigure=None)
        agents.wait_for_steps("n0", "n1", world_size=3)
        agents.torchrun("spare", "raw_live.py", conf=IN_PROCESS)
        deadline_s = time.monotonic() + PATIENCE_S
        while "spare" not in [node.state for node in client.get("done").nodes]:
            assert time.monotonic() < deadline_s, agents.output("spare")
            time.sleep(0.05)

        (agents.directory / "finish").touch()
        for name in ("n0", "n1", "spare"):
            assert agents.exit_code(name) == 0, agents.output(name)
            assert "Traceback" not in agents.output(name)


def test_a_node_that_is_drained_or_told_to_go_leaves_the_others_alone(
    start: Start, controller: ControllerProcess
) -> None:
    with start("drain", "1:3") as agents, JobsClient(controller.grpc) as client:
        agents.torchrun("n0", "raw_live.py", conf=IN_PROCESS)
        agents.stretto_run("n1", "raw_live.py", reconfigure=None)
        agents.torchrun("n2", "raw_live.py", conf=IN_PROCESS)
        generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3)
        client.drain("drain", node_id(agents, "n0"))
        assert agents.exit_code("n0") == 0, agents.output("n0")
        generation = agents.wait_for_steps("n1", "n2", world_size=2, newer_than=generation)

        agents.signal("n1", signal.SIGTERM)
        assert agents.exit_code("n1") == 0, agents.output("n1")
        assert "Traceback" not in agents.output("n1")
        agents.wait_for_steps("n2", world_size=1, newer_than=generation)

        agents.signal("n2", signal.SIGTERM)
        # torch's agent ends with 1 after a signal.
        assert agents.exit_code("n2") == 1
        assert len({row.pid for row in agents.rows()}) == 3


def test_stretto_run_brings_a_controller_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Agents(tmp_path / "logs", "", job="own", nnodes="1") as agents:
        (agents.directory / "finish").touch()
        agents.stretto_run("n0", "raw_live.py", reconfigure=None)
        assert agents.exit_code("n0") == 0, agents.output("n0")
        assert [row.world_size for row in agents.rows()] == [1]
        ready = json.loads((tmp_path / ".stretto" / "run" / "own" / "ready.json").read_text())
        assert not Path(f"/proc/{ready['pid']}").exists()
