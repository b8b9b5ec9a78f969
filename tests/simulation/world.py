"""One schedule: everything that takes part in it, joined by one clock and one random source."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from simulation.agent import Agent
from simulation.faults import Faults
from simulation.groups import Formation
from simulation.histories import fresh
from simulation.invariants import Invariants
from simulation.ledger import Broken
from simulation.network import Network
from simulation.scheduler import Scheduler
from simulation.setup import Setup
from simulation.simulated_controller import Controller
from simulation.storage import Storage
from simulation.worker import Worker

# After everything has healed, so long at most until the job ends or rests for a reason.
PROGRESS_LIMIT_S = 150.0
# A job that rests is looked at this often.
_LOOK_S = 10.0
# After the job has ended, its agents end by then.
_RELEASE_LIMIT_S = 60.0


class World:
    """Holds the parts, and answers what they ask of chance and time."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.tracing = tracing
        self.lines: list[str] = []
        self.setup = Setup.of(self.rng)
        self.scheduler = Scheduler()
        self.network = Network()
        self.storage = Storage()
        self.fresh = fresh()
        self.agents: list[Agent] = []
        self.agents_started = self.workers_started = 0
        self.by_port: dict[int, Worker] = {}
        # Those who are building a generation. Ordered, unlike a set.
        self.building: dict[Worker, None] = {}
        self.invariants = Invariants(self)
        self.controller = Controller(self)
        self._formations: dict[tuple[int, tuple[int, ...]], Formation] = {}
        self.faults = Faults(self)

    # -- chance and time

    def delay_s(self) -> float:
        """Of a message to or from the controller."""
        rng, setup = self.rng, self.setup
        if setup.late_share and rng.random() < setup.late_share:
            return rng.random() * setup.late_s
        return setup.delay_s * (0.5 + rng.random())

    def notice_s(self) -> float:
        """Until a worker sees that a peer's process has ended or left."""
        return self.rng.random() * (0.005 if self.rng.random() < 0.9 else 0.1)

    def save_s(self) -> float:
        return 0.001 + self.rng.random() * (0.005 if self.rng.random() < 0.8 else 0.1)

    def storage_s(self) -> float:
        return 0.01 + self.rng.random() * (0.05 if self.rng.random() < 0.7 else 0.5)

    def compute_s(self) -> float:
        return self.setup.compute_s * (0.7 + 0.6 * self.rng.random())

    def transfer_s(self) -> float:
        return self.setup.transfer_s * (0.5 + self.rng.random())

    def start_up_s(self) -> float:
        return self.setup.start_up_s * (0.5 + self.rng.random())

    # -- what the parts share

    def say(self, who: str, template: str, *args: object) -> None:
        """A line of the trace."""
        if self.tracing:
            self.lines.append(f"{self.scheduler.now_s:9.4f}  {who:14}  {_one_line(template % args)}")

    def formation(self, number: int, ports: tuple[int, ...]) -> Formation:
        formation = self._formations.get((number, ports))
        if formation is None:
            formation = self._formations[number, ports] = Formation(self, number, ports)
        return formation

    def standing_changed(self) -> None:
        """Somebody's standing, or whether it answers: those who build a generation look again."""
        for worker in self.building:
            self.scheduler.after(self.notice_s(), worker.poke)

    def links_changed(self) -> None:
        """Something was cut or healed."""
        self.standing_changed()
        for connection in self.controller.open_connections():
            connection.release()
        for worker in self.live_workers():
            if worker.group is not None and worker.group.open:
                worker.group.formation.retry()

    def live_workers(self) -> list[Worker]:
        return [worker for agent in self.agents for worker in agent.workers if worker.alive]

    def add_node(self, node_id: str, slots: int) -> None:
        """Start an agent there; its machine has power."""
        self.network.dark.discard(node_id)
        agent = Agent(self, node_id, f"{self.rng.random():.12f}", slots)
        self.agents.append(agent)
        agent.start()

    def agent_ended(self, agent: Agent) -> None:
        """It exited or was killed."""
        self.faults.agent_ended(agent)
        self._stop_when_all_ended()

    # -- its course

    def run(self) -> None:
        """Live through the schedule. Raises Broken, naming the invariant."""
        for number, slots in enumerate(self.setup.slots):
            delay_s = self.rng.choice((0.0, self.rng.random() * 2.0))
            self.scheduler.after(delay_s, self.add_node, f"n{number}", slots)
        self.faults.plan()
        self.scheduler.run(self.setup.active_s)
        self.faults.end()
        limit_s = self.scheduler.now_s + PROGRESS_LIMIT_S
        limit_s += 2 * self.setup.limits.hang_limit_s + self.setup.limits.end_limit_s
        while not self.scheduler.stopped and not self.invariants.job_has_ended:
            self.scheduler.run(self.scheduler.now_s + _LOOK_S)
            if self.invariants.job_has_ended or self.scheduler.stopped or self.invariants.rests():
                break
            if self.scheduler.now_s > limit_s:
                self.invariants.must_rest()
        if self.invariants.job_has_ended:
            self.scheduler.run(self.scheduler.now_s + _RELEASE_LIMIT_S)
            self.invariants.everyone_was_released()
            self.invariants.history_adds_up()

    def _stop_when_all_ended(self) -> None:
        if self.faults.over and self.invariants.job_has_ended and not any(agent.alive for agent in self.agents):
            self.scheduler.stopped = True


@dataclass(frozen=True, slots=True)
class Failure:
    """A schedule in which an invariant broke."""

    seed: int
    message: str


def run(seed: int, change: Callable[[World], None] | None = None) -> Failure | None:
    """Live through one schedule. change: applied to the world before it begins."""
    world = World(seed)
    if change is not None:
        change(world)
    try:
        world.run()
    except Broken as broken:
        return Failure(seed, str(broken))
    except Exception as error:  # noqa: BLE001 - a crash of the code under test is a finding, too
        return Failure(seed, f"{type(error).__name__}: {error}")
    return None


def trace(seed: int) -> tuple[list[str], Failure | None]:
    """As `run`, and what happened, line by line."""
    world = World(seed, tracing=True)
    failure = None
    try:
        world.run()
    except Exception as error:  # noqa: BLE001 - as above
        failure = Failure(seed, f"{type(error).__name__}: {error}")
    return world.lines, failure


def _one_line(text: str) -> str:
    return " ".join(text.split())
