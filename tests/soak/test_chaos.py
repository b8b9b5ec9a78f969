"""The long runs (`make soak`): random faults for STRETTO_SOAK_S seconds. STRETTO_SEED replays the seed they print."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from core.test_properties import World
from harness.agents import Agents
from harness.controller import ControllerProcess
from stretto.client import JobsClient
from stretto.sample_log import used_exactly_once
from stretto_controller.core import events as ev

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("STRETTO_SOAK_S", "600"))
# So much of the time goes to the core alone, the rest to real processes.
CORE_SHARE = 0.15
# A target that is never reached: the faults end first.
ENDLESS_TAU = "1e9"
MAX_NODES = 4


def _seed() -> int:
    seed = int(os.environ.get("STRETTO_SEED") or time.time_ns() % 1_000_000)
    print(f"seed {seed} (STRETTO_SEED)", flush=True)
    return seed


def test_invariants_hold_over_new_random_histories() -> None:
    seed, count = _seed(), 0
    end_s = time.monotonic() + SOAK_S * CORE_SHARE
    while time.monotonic() < end_s:
        world = World(seed + count)
        try:
            for _ in range(300):
                event = world.event()
                world.recover() if isinstance(event, ev.Recovered) else world.feed(event)
        except AssertionError as broken:
            raise AssertionError(f"seed {seed + count}: {broken}") from broken
        count += 1
    print(f"{count} histories of 300 events")


class Chaos:
    """One elastic job under random faults, its controller included."""

    def __init__(self, seed: int, directory: Path, controller: ControllerProcess, agents: Agents) -> None:
        self.rng = random.Random(seed)
        self.directory = directory
        self.controller = controller
        self.agents = agents
        self.alive: list[str] = []
        self.count = 0
        self.story: list[str] = []

    def join(self) -> None:
        name = f"n{self.count}"
        self.count += 1
        slots = self.rng.choice([1, 1, 2])
        self.agents.torchrun(name, "elastic.py", str(self.directory), ENDLESS_TAU, slots=slots)
        self.alive.append(name)

    def kill_node(self) -> None:
        name = self._victim()
        # Its worker may just be gone: stopped by the agent for a change that is under way.
        with suppress(ProcessLookupError):
            self.agents.kill_node(name)
        self.alive.remove(name)

    def kill_worker(self) -> None:
        with suppress(ProcessLookupError):
            self.agents.kill_worker(self._victim())

    def drain(self) -> None:
        name = self._victim()
        self.agents.signal(name, signal.SIGTERM)
        self.alive.remove(name)

    def kill_agent(self) -> None:
        name = self._victim()
        self.agents.signal(name, signal.SIGKILL)
        self.alive.remove(name)

    def kill_controller(self) -> None:
        self.controller.kill()
        time.sleep(self.rng.uniform(0.0, 3.0))
        self.controller.start()

    def _victim(self) -> str:
        return self.rng.choice([name for name in self.alive if self._has_stepped(name)])

    def _has_stepped(self, name: str) -> bool:
        return any(row.node == name for row in self.agents.rows())

    def once(self) -> str:
        """One fault, or one join; its name."""
        ready = [name for name in self.alive if self._has_stepped(name)]
        faults = [self.kill_controller]
        if len(self.alive) < MAX_NODES:
            faults += [self.join, self.join]
        if ready:
            faults.append(self.kill_worker)
        if len(ready) > 1:
            faults += [self.kill_node, self.kill_agent, self.drain]
        fault = self.rng.choice(faults)
        fault()
        self.story.append(fault.__name__)
        return fault.__name__

    def wait_until_training(self, limit_s: float = 90.0) -> float:
        """Seconds until steps go on after what has just been done."""
        start_s, mark_s = time.monotonic(), time.time()
        while not any(row.time_s > mark_s + 0.2 for row in self.agents.rows()):
            elapsed_s = time.monotonic() - start_s
            assert elapsed_s < limit_s, f"no step for {limit_s:g} s after {self.story[-5:]}:\n{self._outputs()}"
            time.sleep(0.1)
        return time.monotonic() - start_s

    def _outputs(self) -> str:
        return "\n".join(f"--- {name}\n{self.agents.output(name)[-1500:]}" for name in self.alive)


def test_an_elastic_job_survives_random_faults(tmp_path: Path) -> None:
    seed = _seed()
    with (
        ControllerProcess(tmp_path) as controller,
        Agents(tmp_path / "agents", controller.grpc, nnodes=f"1:{MAX_NODES}") as agents,
    ):
        chaos = Chaos(seed, tmp_path, controller, agents)
        chaos.join()
        chaos.join()
        chaos.wait_until_training()
        end_s = time.monotonic() + SOAK_S * (1 - CORE_SHARE)
        while time.monotonic() < end_s:
            what = chaos.once()
            pause_s = chaos.wait_until_training()
            print(f"{what}: steps after {pause_s:.1f} s", flush=True)
            time.sleep(chaos.rng.uniform(0.0, 3.0))
        with JobsClient(controller.grpc) as client:
            numbers = [summary.generation.number for summary in client.generations("job")]
        assert numbers == sorted(set(numbers)), "generations only grow"
        print(f"{len(chaos.story)} events, {len(numbers)} generations")
    lines = (tmp_path / "samples").read_text().splitlines()
    assert used_exactly_once(lines), "a sample was used twice in an epoch, or left out"
