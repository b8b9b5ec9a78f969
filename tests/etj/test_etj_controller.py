"""The operator's view of a real controller process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etj.etj_site import manifest
from harness.controller import ControllerProcess
from stretto.client import JobsClient
from stretto_operator.controller import PolledController
from stretto_operator.job import Autoscale, Training, read_job
from stretto_operator.outcome import agrees
from stretto_operator.requests import Create, Delete, Pause, Resume, Scale, SetAutoscale

pytestmark = pytest.mark.e2e
_TRAINING = Training(1, 4, "in-process", 16, 16, 0, 2000.0)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path) as controller:
        yield controller


@pytest.fixture
def changed() -> list[str | None]:
    return []


@pytest.fixture
def controller(process: ControllerProcess, changed: list[str | None]) -> Iterator[PolledController]:
    with JobsClient(process.grpc, timeout_s=60) as client:
        yield PolledController(client, changed.append, interval_s=0.1, refused_s=30.0)


async def test_requests_reach_it_and_its_answers_are_the_view(
    controller: PolledController, changed: list[str | None]
) -> None:
    await controller.poll()
    assert controller.view("digits").reachable
    await controller.ask(Create("digits", _TRAINING, 2))
    view = controller.view("digits").job
    assert view is not None
    assert (view.phase, view.desired_nodes, view.training) == ("pending", 2, _TRAINING)
    said: dict[str, Any] = {"minNodes": 1, "maxNodes": 4, "baseBatchSize": 16, "batchSize": 16, "targetTau": 2000}
    assert agrees(view, read_job(manifest(**said)))
    await controller.ask(Scale("digits", 3))
    await controller.ask(SetAutoscale("digits", Autoscale("act", "progress", 0.7)))
    await controller.ask(Pause("digits"))
    await controller.poll()
    view = controller.view("digits").job
    assert view is not None
    assert (view.phase, view.desired_nodes) == ("paused", 3)
    assert view.autoscale == Autoscale("act", "progress", 0.7)
    await controller.ask(Resume("digits"))
    await controller.ask(Delete("digits"))
    await controller.poll()
    assert controller.view("digits").job is None
    assert "digits" in changed


async def test_a_refusal_is_in_the_view_until_the_job_changes(
    controller: PolledController, process: ControllerProcess
) -> None:
    await controller.ask(Create("digits", _TRAINING, 2))
    await controller.ask(Create("digits", Training(1, 8, "in-process"), 2))
    assert "max_nodes" in controller.view("digits").refusal
    await controller.poll()
    with JobsClient(process.grpc) as client:
        client.delete("digits")
    await controller.poll()
    assert controller.view("digits").refusal == ""


async def test_a_controller_that_is_gone_is_said_to_be_and_what_was_known_stays(
    controller: PolledController, process: ControllerProcess, changed: list[str | None]
) -> None:
    await controller.ask(Create("digits", _TRAINING, 2))
    await controller.poll()
    process.kill()
    await controller.poll()
    view = controller.view("digits")
    assert not view.reachable
    assert "no controller can be reached" in view.reason
    assert view.job is not None
    assert changed[-1] is None
    process.start()
    # gRPC itself waits before it tries again.
    async with asyncio.timeout(60):
        while not controller.view("digits").reachable:
            await controller.poll()
            await asyncio.sleep(0.1)
