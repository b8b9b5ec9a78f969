"""A job whose nodes all died starts from its newest checkpoint on others; checkpoints come when they are asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.live_job import LiveJob
from stretto.checkpoint import Catalogue, Checkpointer
from stretto.checkpoint.store import Store
from stretto.client import JobsClient

pytestmark = pytest.mark.e2e


def _stretto(controller: ControllerProcess, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("stretto")), *arguments]
    environment = {**os.environ, "STRETTO_ENDPOINT": controller.grpc, "COLUMNS": "200"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.timeout(300)
def test_a_job_starts_from_its_newest_checkpoint_on_other_nodes(tmp_path: Path) -> None:
    with (
        ControllerProcess(tmp_path) as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes="1:3") as agents,
        JobsClient(controller.grpc) as client,
    ):
        job = LiveJob(tmp_path, controller, agents, checkpoint_steps=10**6)
        job.start("n0", slots=2)
        agents.wait_for_steps("n0", world_size=2)
        _stretto(controller, "jobs", "checkpoint", "job")
        job.until(lambda: client.get("job").checkpoint.step > 0, "no checkpoint was written")
        asked_for = client.get("job").checkpoint
        assert {"checkpoint_requested", "checkpoint_committed"} <= {event.kind for event in client.events("job")}
        assert asked_for.size_bytes > 0
        assert Checkpointer(tmp_path / "checkpoints").verify(asked_for.path)
        generation = job.generation()
        agents.kill_node("n0")
        job.start("n1")
        agents.wait_for_steps("n1", world_size=1, newer_than=generation)
        resumed = min(row.step for row in agents.rows() if row.node == "n1")
        assert resumed == asked_for.step + 1
        assert "job" in _stretto(controller, "checkpoints", "show", str(tmp_path / "checkpoints"))
    job.check_samples()


@pytest.mark.timeout(300)
def test_a_live_jobs_checkpoint_goes_on_in_restart_mode(tmp_path: Path) -> None:
    second = tmp_path / "second"
    with (
        ControllerProcess(tmp_path) as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes="1:1") as agents,
        Agents(tmp_path / "others", controller.grpc, job="second", nnodes="1:1") as others,
        JobsClient(controller.grpc) as client,
    ):
        job = LiveJob(tmp_path, controller, agents, checkpoint_steps=10**6)
        job.start("n0")
        agents.wait_for_steps("n0", world_size=1)
        _stretto(controller, "jobs", "checkpoint", "job")
        job.until(lambda: client.get("job").checkpoint.step > 0, "no checkpoint was written")
        saved = client.get("job").checkpoint
        agents.kill_node("n0")
        # Another job's folder, so that neither its claim nor its fences come along.
        shutil.copytree(saved.path, second / "checkpoints" / Path(saved.path).name)
        others.stretto_run("m0", "live.py", str(second), json.dumps({"checkpoint_steps": 10**6}), slots=2)
        others.wait_for_steps("m0", world_size=2)
        assert min(row.step for row in others.rows()) == saved.step + 1
        rows = [json.loads(line) for path in second.glob("losses-*") for line in path.read_text().splitlines()]
        assert all(row["tau"] > saved.tau for row in rows)


@pytest.mark.timeout(300)
def test_a_job_that_shrinks_to_its_minimum_is_saved(tmp_path: Path) -> None:
    with (
        ControllerProcess(tmp_path) as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes="1:2") as agents,
        JobsClient(controller.grpc) as client,
    ):
        job = LiveJob(tmp_path, controller, agents, checkpoint_steps=10**6)
        for name in ("n0", "n1"):
            job.start(name)
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        agents.kill_node("n1")
        generation = agents.wait_for_steps("n0", world_size=1, newer_than=generation)
        job.until(lambda: client.get("job").checkpoint.generation >= generation, "the last node's state was not saved")


@pytest.mark.timeout(300)
def test_what_was_asked_for_is_saved_although_the_loop_is_left(tmp_path: Path) -> None:
    with (
        ControllerProcess(tmp_path) as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes="2:2") as agents,
    ):
        job = LiveJob(tmp_path, controller, agents, checkpoint_steps=10**6, leave_at=7)
        for name in ("n0", "n1"):
            job.start(name)
        catalogue = Catalogue(Store(tmp_path / "checkpoints"))
        job.until(lambda: any(map(catalogue.committed, catalogue.newest_first())), "nothing was saved")
        (saved,) = catalogue.newest_first()
        assert saved.step == 7
        assert catalogue.verify(saved)
        assert catalogue.manifest(saved).world_size == 2
