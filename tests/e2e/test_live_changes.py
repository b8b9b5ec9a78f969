"""Planned changes of live workers: nodes join and drain, a job is paused and scaled; the curve does not notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.agents import SCRIPTS, Agents
from harness.controller import ControllerProcess
from harness.live_job import LiveJob
from stretto.client import JobsClient

pytestmark = pytest.mark.e2e


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path) as controller:
        yield controller


def _undisturbed(directory: Path, options: dict[str, object]) -> dict[int, float]:
    """The losses of the same training in one process, without a controller."""
    directory.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRETTO_")}
    environment |= {"WORKER_LOG_DIR": str(directory), "WORKER_NODE": "alone", "LOCAL_RANK": "0"}
    environment |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, str(SCRIPTS / "live.py"), str(directory), json.dumps({**options, "pace_s": 0})]
    subprocess.run(command, env=environment, check=True, timeout=200)
    lines = next(directory.glob("losses-*.jsonl")).read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("stock", "scaling"),
    [
        # AdaScale's gain is an estimate, from as many gradients as there are workers; at S = 1 it is 1 all the same.
        (True, {"base_batch_size": 12, "samples": 96, "target_tau": 1000}),
        (False, {"base_batch_size": 4, "rule": "linear", "target_tau": 3000}),
    ],
    ids=["torchrun", "stretto run"],
)
def test_the_loss_curve_does_not_notice_six_changes(
    controller: ControllerProcess, tmp_path: Path, stock: bool, scaling: dict[str, object]
) -> None:
    """Grow, kill, pause and resume, scale, drain: with a fixed global batch the curve is the undisturbed one's."""
    options = {"global_batch_size": 12, "batch_size": 4, "seed": 7, "lr": 0.001, "num_workers": 1, **scaling}
    with Agents(tmp_path / "agents", controller.grpc, nnodes="1:3") as agents, JobsClient(controller.grpc) as client:
        job = LiveJob(tmp_path, controller, agents, stock=stock, **options)
        job.pace(0.2)
        job.start("n0", slots=2)
        generation = agents.wait_for_steps("n0", world_size=2)
        job.start("n1")
        generation = agents.wait_for_steps("n0", "n1", world_size=3, newer_than=generation)
        agents.kill_worker("n1")
        generation = agents.wait_for_steps("n0", world_size=2, newer_than=generation)
        generation = agents.wait_for_steps("n0", "n1", world_size=3, newer_than=generation)
        client.pause("job")
        job.until(lambda: client.get("job").phase == "paused", "the job was not paused")
        assert client.get("job").checkpoint.step == client.get("job").progress.step
        paused_at = job.step()
        time.sleep(0.5)
        assert job.step() == paused_at, "a paused job takes no step"
        client.resume("job")
        generation = agents.wait_for_steps("n0", "n1", world_size=3, newer_than=generation)
        client.scale("job", 1)
        generation = agents.wait_for_steps("n0", world_size=2, newer_than=generation)
        client.scale("job", 3)
        generation = agents.wait_for_steps("n0", "n1", world_size=3, newer_than=generation)
        agents.signal("n0", signal.SIGTERM)
        agents.wait_for_steps("n1", world_size=1, newer_than=generation)
        job.pace(0)
        if not stock:
            assert agents.exit_code("n0") == 0, agents.output("n0")
        assert agents.exit_code("n1") == 0, agents.output("n1")
        assert client.get("job").phase == "succeeded"
        last, history = client.get("job").progress, client.generations("job")
        assert "Traceback" not in agents.output("n1")
    steps = job.check_samples()
    losses = job.losses()
    assert len(losses) == steps == last.step
    assert sum(row.steps for row in history) == last.step, "also those of which the killed worker told nobody"
    assert [row.first_tau for row in history] == [0.0, *(row.last_tau for row in history[:-1])]
    assert history[-1].last_tau == last.tau
    alone = _undisturbed(tmp_path / "alone", options)
    assert losses.keys() == alone.keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(alone[step], rel=1e-10, abs=1e-12), f"step {step}"


@pytest.mark.timeout(200)
def test_below_min_nodes_the_survivors_keep_the_state_and_wait(controller: ControllerProcess, tmp_path: Path) -> None:
    with Agents(tmp_path / "agents", controller.grpc, nnodes="2:3") as agents, JobsClient(controller.grpc) as client:
        job = LiveJob(tmp_path, controller, agents, checkpoint_steps=10**6)
        for name in ("n0", "n1"):
            job.start(name)
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        agents.kill_node("n1")
        job.until(lambda: client.get("job").phase == "waiting", "the job does not wait")
        left_at = job.step()
        job.start("n2")
        agents.wait_for_steps("n0", "n2", world_size=2, newer_than=generation)
        assert job.step() > left_at
    job.check_samples()
    job.losses()
