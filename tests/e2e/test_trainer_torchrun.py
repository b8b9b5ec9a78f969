"""ElasticTrainer under stock torchrun: nodes come, drain, die; a sample is used once per epoch all the same."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from stretto.client import JobsClient
from stretto.sample_log import used_exactly_once

pytestmark = pytest.mark.e2e

SCRIPT = "elastic.py"


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path) as controller:
        yield controller


def _log(directory: Path) -> list[str]:
    return (directory / "samples").read_text().splitlines()


def _steps_taken_back(lines: list[str]) -> int:
    """How many steps were done again after a restart from a checkpoint."""
    taken_back, step = 0, 0
    for entry in map(json.loads, lines):
        if "resumed_step" in entry:
            taken_back += step - entry["resumed_step"]
        else:
            step = entry["step"]
    return taken_back


@pytest.mark.timeout(300)
def test_nothing_is_done_twice_when_nodes_join_and_drain(controller: ControllerProcess, tmp_path: Path) -> None:
    with Agents(tmp_path / "agents", controller.grpc, nnodes="1:3") as agents:
        options = (str(tmp_path), "1200", "1")
        slowly = tmp_path / "slowly"
        slowly.touch()
        agents.torchrun("n0", SCRIPT, *options)
        generation = agents.wait_for_steps("n0", world_size=1)
        agents.torchrun("n1", SCRIPT, *options, slots=2)
        generation = agents.wait_for_steps("n0", "n1", world_size=3, newer_than=generation)
        controller.restart()
        agents.signal("n0", signal.SIGTERM)
        agents.wait_for_steps("n1", world_size=2, newer_than=generation)
        slowly.unlink()
        assert agents.exit_code("n1") == 0, agents.output("n1")
        lines = _log(tmp_path)
        assert used_exactly_once(lines)
        assert _steps_taken_back(lines) == 0
        with JobsClient(controller.grpc) as client:
            job = client.get("job")
            assert job.phase == "succeeded"
            assert job.progress.tau >= 1200
            assert job.checkpoint.step == job.progress.step
            history = client.generations("job")
        assert [(len(g.generation.members), g.generation.scale) for g in history] == [(1, 1.0), (2, 3.0), (1, 2.0)]
        assert sum(summary.steps for summary in history) == job.progress.step


@pytest.mark.timeout(300)
def test_after_a_killed_node_training_goes_on_from_the_checkpoint(
    controller: ControllerProcess, tmp_path: Path
) -> None:
    with Agents(tmp_path / "agents", controller.grpc, nnodes="1:2") as agents:
        for name in ("n0", "n1"):
            agents.torchrun(name, SCRIPT, str(tmp_path), "900")
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        deadline_s = time.monotonic() + 30
        while max(row.step for row in agents.rows()) < 30:
            assert time.monotonic() < deadline_s, agents.output("n0")
            time.sleep(0.05)
        # The first node: rank 0 wrote the checkpoints.
        agents.kill_node("n0")
        agents.wait_for_steps("n1", world_size=1, newer_than=generation)
        assert agents.exit_code("n1") == 0, agents.output("n1")
        with JobsClient(controller.grpc) as client:
            last, history = client.get("job").progress, client.generations("job")
    assert sum(row.steps for row in history) == last.step, "what was done again counts once"
    assert [row.first_tau for row in history] == [0.0, *(row.last_tau for row in history[:-1])]
    lines = _log(tmp_path)
    assert used_exactly_once(lines)
    assert _steps_taken_back(lines) <= 25 + 1, "no more than one interval is done again"
    resumed = [json.loads(line)["resumed_step"] for line in lines if "resumed_step" in line]
    assert resumed[-1] > 0
