"""A real job in mode act: it grows when its gain rises and gives nodes back when it falls, and says why."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from stretto.client import JobsClient
from stretto_proto.v1 import jobs_pb2
from stretto_proto.v1 import types_pb2 as types

pytestmark = pytest.mark.e2e

PATIENCE_S = 120.0
# As in earnest, only sooner.
SOONER = {
    "STRETTO_SERVICE_REVIEW_INTERVAL_S": "0.5",
    "STRETTO_LIMITS_RESIZE_INTERVAL_S": "3",
    "STRETTO_LIMITS_RESIZE_CONFIRM_S": "1.5",
    # A busy machine's pauses are long.
    "STRETTO_LIMITS_PAUSE_SHARE": "0.5",
}


class Watched:
    """The job as its owner sees it."""

    def __init__(self, client: JobsClient, agents: Agents) -> None:
        self._client = client
        self._agents = agents

    def job(self) -> jobs_pb2.Job:
        return self._client.get("job")

    def changes(self) -> list[str]:
        return [event.reason for event in self._client.events("job") if event.kind == "size_chosen"]

    def until(self, what: str, condition: Callable[[jobs_pb2.Job], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition(self.job()):
            assert time.monotonic() < deadline_s, self._agents.story(f"{what}: {self.job()}")
            time.sleep(0.1)

    def steps_on(self, steps: int) -> None:
        """So many steps more, with a review every ten of them."""
        goal = self.job().progress.step + steps
        self.until("the steps did not come", lambda job: job.progress.step >= goal)


@pytest.mark.timeout(400)
def test_grows_when_the_gain_rises_and_gives_nodes_back_when_it_falls(tmp_path: Path) -> None:
    (tmp_path / "noise").write_text("0.02")
    with (
        ControllerProcess(tmp_path, **SOONER) as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes="2:4") as agents,
        JobsClient(controller.grpc) as client,
    ):
        spec = types.JobSpec(min_nodes=2, max_nodes=4, mode=types.RECONFIGURE_MODE_IN_PROCESS)
        client.create("job", spec, desired_nodes=2)
        client.set_autoscale("job", types.Autoscale(mode=types.AUTOSCALE_MODE_ACT))
        watched = Watched(client, agents)
        for name in ("n0", "n1", "n2", "n3"):
            agents.stretto_run(name, "noisy.py", str(tmp_path), reconfigure=None, max_restarts=100)
        watched.until("nothing was recommended", lambda job: job.recommendation.nodes == 2)
        watched.steps_on(100)
        assert watched.changes() == [], "two workers of next to no noise need no third"

        (tmp_path / "noise").write_text("50")
        watched.until("it did not grow", lambda job: job.generation.world_size == 4)
        watched.until("it is not seen to pay", lambda job: job.recommendation.nodes == 4)
        rates = {size.nodes: size.progress_rate for size in watched.job().recommendation.sizes}
        watched.steps_on(200)
        assert len(watched.changes()) <= 2, watched.changes()
        assert watched.job().progress_rate == pytest.approx(rates[4], rel=0.5)
        grown = len(watched.changes())

        controller.restart()
        watched.until("it is not seen again", lambda job: job.recommendation.points >= 2)
        (tmp_path / "noise").write_text("0.02")
        watched.until("it did not shrink", lambda job: job.generation.world_size == 2)
        watched.steps_on(200)
        changes = watched.changes()
        print("\n".join(changes))
        assert watched.job().desired_nodes == 2
        assert len(changes) - grown <= 2, changes
        assert changes[0].startswith(("3 nodes instead of 2", "4 nodes instead of 2"))
        assert changes[-1].startswith("2 nodes instead of")

        client.scale("job", 3)
        assert watched.job().autoscale.mode == types.AUTOSCALE_MODE_RECOMMEND
        watched.until("a person was not obeyed", lambda job: job.generation.world_size == 3)
        watched.steps_on(50)
        assert watched.job().desired_nodes == 3
