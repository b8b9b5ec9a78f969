"""Live workers that fail at every point of a step and of a change: the others go on, and no sample is lost.

One job lives through all tests of this module, in their order.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.live_job import LiveJob

pytestmark = pytest.mark.e2e

NAMES = ("n0", "n1", "n2")
IN_A_STEP = ("forward", "backward", "all_reduce", "optimizer")
IN_A_CHECKPOINT = ("before checkpoint", "state", "after share", "after checkpoint")
IN_A_CHANGE = ("ask", "before build", "after build", "broadcast", "load")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveJob]:
    """Three nodes that train together; a fixed global batch, so that the curve does not depend on their number."""
    directory: Path = tmp_path_factory.mktemp("job")
    with (
        ControllerProcess(directory) as controller,
        Agents(directory / "agents", controller.grpc, named=True) as agents,
    ):
        live = {"ddp": {"bucket_cap_mb": 1e-4}}  # several buckets, small as the model is
        job = LiveJob(directory, controller, agents, global_batch_size=12, batch_size=6, base_batch_size=12, live=live)
        for name in NAMES:
            job.start(name)
        yield job


@pytest.fixture(autouse=True)
def _all_there(job: LiveJob) -> None:
    job.agents.wait_for_steps(*NAMES, world_size=3, newer_than=job.generation() - 1)


def _strike(job: LiveJob, name: str, point: str, kind: str) -> None:
    """The node's worker fails there; the others step on without it, and do not wait for it."""
    others = set(NAMES) - {name}
    job.inject(name, point, kind)
    pid = job.agents.worker_pid(name)
    generation = job.generation()
    job.struck(name)
    job.until(lambda: job.steps_since(generation, without=pid) >= others, f"{others} do not go on without {name}")


def _is_there(job: LiveJob, name: str) -> bool:
    return name in job.steps_since(job.generation() - 1)


def _in_turn(job: LiveJob, points: tuple[str, ...], kind: str) -> None:
    for position, point in enumerate(points):
        name = NAMES[position % len(NAMES)]
        job.until(partial(_is_there, job, name), f"{name} does not come back")
        _strike(job, name, point, kind)


def _slow(job: LiveJob) -> list[dict[str, str]]:
    return [event for event in job.controller.ask("events", "job") if event["kind"] == "worker_slow"]


def _nothing_is_lost(job: LiveJob) -> None:
    job.agents.wait_for_steps(*NAMES, world_size=3, newer_than=job.generation() - 1)
    assert job.check_samples() > 0
    assert job.losses()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["KILL", "raise", "memory", "STOP"])
def test_a_worker_fails_at_any_point_of_a_step(job: LiveJob, kind: str) -> None:
    """A stopped one is ended by its agent, on the controller's word."""
    _in_turn(job, IN_A_STEP, kind)
    _nothing_is_lost(job)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("point", ["forward", "bucket", "optimizer"])
def test_who_holds_a_step_up_is_named_and_waited_for(job: LiveJob, point: str) -> None:
    """In the midst of backward too, when its first bucket is on its way and its others are not."""
    generation, known = job.generation(), len(_slow(job))
    job.inject("n1", point, "sleep")
    job.struck("n1")
    job.until(lambda: len(_slow(job)) > known, "nobody is named")
    assert [event["node_id"] for event in _slow(job)[known:]] == ["n1"]
    held_up = job.step()
    job.until(lambda: job.step() > held_up + 1, "it is not waited for")
    assert job.generation() == generation


@pytest.mark.timeout(400)
def test_rank_0_dies_at_any_point_of_a_checkpoint(job: LiveJob) -> None:
    for point in IN_A_CHECKPOINT:
        first = next(row.node for row in reversed(job.agents.rows()) if row.rank == 0)
        _strike(job, first, point, "KILL")
        _nothing_is_lost(job)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("point", IN_A_CHANGE)
def test_a_second_worker_dies_while_the_others_meet_again(job: LiveJob, point: str) -> None:
    """n2 is killed in a step; while the others form a generation, or take it in again, n1 dies."""
    generation = job.generation()
    job.inject("n1", point, "KILL")
    job.inject("n2", "backward", "KILL")
    job.struck("n2")
    job.struck("n1")
    job.agents.wait_for_steps(*NAMES, world_size=3, newer_than=generation)
    _nothing_is_lost(job)


@pytest.mark.timeout(200)
def test_two_of_three_die_at_once_and_the_third_has_the_state(job: LiveJob) -> None:
    step, generation = job.step(), job.generation()
    for name in ("n0", "n1"):
        job.agents.kill_worker(name)
    job.agents.wait_for_steps(*NAMES, world_size=3, newer_than=generation)
    _nothing_is_lost(job)
    assert job.step() > step


@pytest.mark.timeout(200)
def test_a_node_dies_while_the_controller_is_away_and_another_drains(job: LiveJob) -> None:
    """The last test: two nodes end for good."""
    generation = job.generation()
    job.controller.kill()
    job.agents.kill_node("n0")
    job.controller.start()
    generation = job.agents.wait_for_steps("n1", "n2", world_size=2, newer_than=generation)
    job.agents.signal("n1", signal.SIGTERM)
    job.agents.wait_for_steps("n2", world_size=1, newer_than=generation)
    assert job.agents.exit_code("n1") == 0, job.agents.output("n1")
    assert job.check_samples() > 0
    assert job.losses()
