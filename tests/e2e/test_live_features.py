"""What models and loaders bring along: buffers, torch.compile, a loader's children; all of it survives changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.live_job import LiveJob

pytestmark = pytest.mark.e2e


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path) as controller:
        yield controller


def _children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.mark.timeout(300)
def test_buffers_compiled_models_and_loaders_live_through_changes(
    controller: ControllerProcess, tmp_path: Path
) -> None:
    with Agents(tmp_path / "agents", controller.grpc, nnodes="1:3") as agents:
        job = LiveJob(tmp_path, controller, agents, layers="running_mean", compile=True, num_workers=2)
        for name in ("n0", "n1"):
            job.start(name)
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        job.start("n2")
        generation = agents.wait_for_steps("n0", "n1", "n2", world_size=3, newer_than=generation)
        survivors = [agents.worker_pid(name) for name in ("n1", "n2")]
        victim = agents.worker_pid("n0")
        children = _children(victim)
        assert len(children) >= 2, "the loader's children"
        agents.kill_worker("n0")
        generation = agents.wait_for_steps("n1", "n2", world_size=2, newer_than=generation)
        job.until(
            lambda: not any(Path(f"/proc/{child}").exists() for child in children), "a killed worker's children live on"
        )
        agents.wait_for_steps("n0", "n1", "n2", world_size=3, newer_than=generation)
        assert [agents.worker_pid(name) for name in ("n1", "n2")] == survivors, "the others were not restarted"
        graphs = [int((tmp_path / f"graphs-{pid}").read_text()) for pid in survivors]
        # One for the batch size seen first, one for others, one for evaluation or a single sample: none per change.
        assert max(graphs) <= 3, f"compiled anew: {graphs} graphs after 4 generations"
    job.check_samples()
    job.losses()
