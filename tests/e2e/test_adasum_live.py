"""Adasum in live workers under a real controller: joins, a drain, and deaths in the midst of it."""

from __future__ import annotations

import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.live_job import LiveJob
from stretto.client import JobsClient

pytestmark = pytest.mark.e2e


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path) as controller:
        yield controller


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rule", ["adasum", "adasum-delta"])
def test_the_world_goes_from_2_to_3_to_5_to_4_with_kills_between(
    controller: ControllerProcess, tmp_path: Path, rule: str
) -> None:
    with Agents(tmp_path / "agents", controller.grpc, nnodes="1:3") as agents, JobsClient(controller.grpc) as client:
        job = LiveJob(tmp_path, controller, agents, rule=rule, lr=0.002, checkpoint_steps=20)
        job.pace(0.05)
        job.start("n0")
        job.start("n1")
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        # Two ranks exchange gradients (or moves) whole, by broadcasts; three first their shards and then the results.
        job.inject("n1", "broadcast", "KILL")
        job.struck("n1")
        generation = agents.wait_for_steps("n0", "n1", world_size=2, newer_than=generation)
        job.start("n2")
        generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3, newer_than=generation)
        for point in ("all_to_all", "broadcast"):
            job.inject("n1", point, "KILL")
            job.struck("n1")
            generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3, newer_than=generation)
        ratios = _ratios(controller)
        agents.signal("n2", signal.SIGTERM)
        generation = agents.wait_for_steps("n0", "n1", world_size=2, newer_than=generation)
        job.start("n3", slots=3)
        generation = agents.wait_for_steps("n0", "n1", "n3", world_size=5, newer_than=generation)
        agents.kill_node("n1")
        generation = agents.wait_for_steps("n0", "n3", world_size=4, newer_than=generation)
        job.pace(0)
        job.finish()
        for name in ("n0", "n3"):
            assert agents.exit_code(name) == 0, agents.output(name)
        progress = client.get("job").progress
        assert progress.tau == progress.step, "the schedule is not stretched"
        assert len(progress.orthogonality) == 3
    assert 0.0 <= ratios["0"] <= ratios["0.5"] <= ratios["1"] <= 1.0 + 1e-9
    job.check_samples()
    assert job.check_states() > 5
    job.losses()


def _ratios(controller: ControllerProcess) -> dict[str, float]:
    text = urllib.request.urlopen(f"{controller.http}/metrics", timeout=10).read().decode()
    name = "stretto_adasum_orthogonality_ratio"
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return {line.split('quantile="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}
