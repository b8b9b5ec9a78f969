"""Live workers in a network that falls apart and heals: who goes on, who is kept out, and who comes back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.installed import installed
from harness.live_job import LiveJob
from harness.network import Network

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CONTROLLER = "control"
NODES = ("n0", "n1", "n2")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    installed("ip")
    objection = Network.objection()
    if objection is not None:
        # Not what `make test` could install: a container may not be allowed to.
        pytest.skip(f"{objection}; these tests make hosts of their own, as root on Linux")
    with Network(CONTROLLER, *NODES) as network:
        yield network


@pytest.fixture(scope="module")
def job(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveJob]:
    """Three nodes on three hosts, and the controller on a fourth."""
    directory = tmp_path_factory.mktemp("partitions")
    settings = {"STRETTO_HOST": network.address(CONTROLLER), "STRETTO_INSECURE": "yes", "STRETTO_LIMITS_APART_S": "5"}
    with (
        ControllerProcess(directory, network.command(CONTROLLER), **settings) as controller,
        Agents(directory / "agents", controller.grpc, named=True, network=network) as agents,
    ):
        job = LiveJob(directory, controller, agents, global_batch_size=12, batch_size=6, pace_s=0.2)
        for name in NODES:
            job.start(name)
        agents.wait_for_steps(*NODES, world_size=3)
        yield job


@pytest.fixture(autouse=True)
def healed(network: Network, job: LiveJob) -> Iterator[None]:
    """Each test begins and ends with three nodes that train together, and with evidence that is in order."""
    yield
    network.heal()
    job.agents.wait_for_steps(*NODES, world_size=3, newer_than=_generation(job) - 1)
    assert job.check_samples() > 0
    assert job.losses()
    assert job.check_states() > 0


def _generation(job: LiveJob) -> int:
    return max(row.generation for row in job.agents.rows())


def _lost(job: LiveJob) -> list[str]:
    """Nodes that the controller has called lost."""
    return [event["node_id"] for event in job.controller.ask("events", "job") if event["kind"] == "node_lost"]


def test_who_is_cut_off_from_its_peers_is_kept_out_until_the_network_heals(network: Network, job: LiveJob) -> None:
    """The controller hears all three; the two that reach each other go on.

    Cut after the first step of a generation, if this machine is quick: in the second one DDP makes a collective of its
    own, where nobody is seen to wait.
    """
    generation = _generation(job)
    network.cut(["n1"], ["n0", "n2"])
    generation = job.agents.wait_for_steps("n0", "n2", world_size=2, newer_than=generation)
    network.heal()
    job.agents.wait_for_steps(*NODES, world_size=3, newer_than=generation)


def test_nothing_happens_while_the_controller_cannot_be_reached(network: Network, job: LiveJob) -> None:
    """For longer than any heartbeat may be missed: steps advance, and a step needs every member."""
    generation, pids = _generation(job), {name: job.agents.worker_pid(name) for name in NODES}
    network.cut([CONTROLLER], NODES[1:])
    began_s = time.time()
    time.sleep(5.0)
    network.cut([CONTROLLER], NODES)
    time.sleep(5.0)
    network.heal()
    time.sleep(3.0)
    assert _lost(job) == []
    rows = [row for row in job.agents.rows() if row.time_s > began_s]
    assert {row.generation for row in rows} == {generation}
    assert {row.pid for row in rows} == set(pids.values())


def test_who_is_cut_off_from_everyone_is_lost_and_joins_anew(network: Network, job: LiveJob) -> None:
    generation, pid = _generation(job), job.agents.worker_pid("n0")
    network.cut(["n0"], [CONTROLLER, "n1", "n2"])
    generation = job.agents.wait_for_steps("n1", "n2", world_size=2, newer_than=generation)
    assert _lost(job) == ["n0"]
    alone = job.step()
    network.heal()
    job.agents.wait_for_steps(*NODES, world_size=3, newer_than=generation)
    first = next(row for row in job.agents.rows() if row.node == "n0" and row.generation > generation)
    assert first.step > alone, "its state is the others'"
    assert first.pid == pid, job.agents.story("n0's worker had no reason to end")


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_long_partition_costs_those_that_train_little(network: Network, job: LiveJob) -> None:
    """They try again with the other one now and then, and less and less often."""
    generation, began_s = _generation(job), time.time()
    network.cut(["n2"], ["n0", "n1"])
    time.sleep(100.0)
    tried = _generation(job) - generation
    assert 2 <= tried <= 12, "one without it; then two for each attempt: one with it, one without"
    times = [row.time_s for row in job.agents.rows() if row.time_s > began_s]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times)]
    lost_s = sum(gap_s for gap_s in gaps_s if gap_s > 0.3)
    print(f"{tried} generations, {lost_s:.1f} of 100 s without a step, {max(gaps_s):.1f} s at most", flush=True)
    assert lost_s < 50.0
    network.heal()
    job.agents.wait_for_steps(*NODES, world_size=3, newer_than=_generation(job), patience_s=200.0)
