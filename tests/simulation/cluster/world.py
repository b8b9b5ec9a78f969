"""One schedule of several controllers on etcd, or of one on a disk, joined by one clock and one random source."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from simulation.cluster.faults import Faults
from simulation.cluster.invariants import Broken, Invariants
from simulation.cluster.members import Members
from simulation.cluster.nodes import Node
from simulation.cluster.people import Person
from simulation.cluster.process import Process
from simulation.scheduler import Scheduler
from simulation.setup import SHORT
from stretto_controller.core.limits import Limits
from stretto_controller.settings import ServiceLimits
from stretto_controller.store.database import Database

_LOOK_S = 0.1
# After everything has healed, so long at most until all have what they want.
_SETTLE_LIMIT_S = 90.0
_CONTROLLERS = 3


@dataclass(slots=True)
class Setup:
    """One schedule's circumstances. Times in seconds."""

    etcd: bool
    limits: Limits
    service: ServiceLimits
    min_nodes: int
    max_nodes: int
    nodes: int
    people: int
    faults: int
    active_s: float
    delay_s: float
    # So many requests to etcd, and answers, are lost or late; then nobody is held to a time.
    lossy: float
    # So many of people's requests are to delete their job.
    deletions: float
    # Between a person's requests, at most.
    request_pause_s: float
    # Which of etcd's members each controller asks first.
    rotation: int

    @classmethod
    def of(cls, rng: random.Random) -> Setup:
        etcd = rng.random() < 0.75
        min_nodes = rng.choice((1, 1, 2))
        return cls(
            etcd=etcd,
            limits=SHORT,
            # The rate is counted on the real clock.
            service=replace(ServiceLimits(), stream_messages_burst=10**9),
            min_nodes=min_nodes,
            max_nodes=rng.choice((2, 3, 4)),
            nodes=rng.randint(min_nodes, 3),
            people=rng.choice((1, 1, 2)),
            faults=rng.choice((2, 3, 4, 5, 6, 8)) if etcd else rng.choice((3, 6, 10)),
            active_s=rng.choice((8.0, 12.0, 20.0)),
            delay_s=rng.choice((0.0005, 0.002, 0.015)),
            lossy=rng.choice((0.0, 0.0, 0.02, 0.1)),
            deletions=rng.choice((0.02, 0.1, 0.3)),
            request_pause_s=rng.choice((0.1, 0.5, 2.0)),
            rotation=rng.choice((0, 0, 1, 2)),
        )


class World:
    """Holds the parts, and answers what they ask of chance and time."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.tracing = tracing
        self.lines: list[str] = []
        self.setup = Setup.of(self.rng)
        self.scheduler = Scheduler()
        self.invariants = Invariants(self)
        self.faults = Faults(self)
        self.members = Members(self)
        service = self.setup.service
        self.disk = Database(":memory:", kept_events=service.kept_events, kept_generations=service.kept_generations)
        self.processes = [Process(self, number) for number in range(_CONTROLLERS if self.setup.etcd else 1)]
        self.nodes: list[Node] = []
        self.people: list[Person] = []

    # -- chance and time

    def delay_s(self) -> float:
        """Of a message, one way."""
        return self.setup.delay_s * (0.5 + self.rng.random())

    def work_s(self) -> float:
        """Of what a process gives to a thread."""
        return self.rng.random() * 0.002

    def write_s(self) -> float:
        """Until the disk has it."""
        return 0.001 + self.rng.random() * (0.005 if self.rng.random() < 0.8 else 0.1)

    def say(self, who: str, template: str, *args: object) -> None:
        """A line of the trace."""
        if self.tracing:
            self.lines.append(f"{self.scheduler.now_s:9.4f}  {who:9}  {' '.join((template % args).split())}")

    # -- its course

    def run(self) -> None:
        """Live through the schedule. Raises Broken, naming the invariant."""
        setup, scheduler = self.setup, self.scheduler
        for process in self.processes:
            scheduler.after(self.rng.random() * 0.2, process.start)
        for _ in range(setup.nodes):
            scheduler.after(self.rng.random() * 2.0, self.faults.join)
        self.people += [Person(self, number) for number in range(setup.people)]
        self.faults.plan()
        self._until(setup.active_s)
        self.faults.end()
        limit_s = scheduler.now_s + _SETTLE_LIMIT_S
        while not self.invariants.settled():
            self._until(scheduler.now_s + 1.0)
            self.invariants.require(scheduler.now_s < limit_s, "nothing came to rest after the faults")
        self.invariants.at_the_end()

    def end(self) -> None:
        """Nobody has anything to say any more."""
        for process in self.processes:
            process.kill()
        # Those who were killed are buried.
        self.scheduler.run(self.scheduler.now_s)
        self.disk.close()

    def _until(self, end_s: float) -> None:
        while self.scheduler.now_s < end_s:
            self.scheduler.run(min(end_s, self.scheduler.now_s + _LOOK_S))
            self.invariants.look()


@dataclass(frozen=True, slots=True)
class Failure:
    """A schedule in which an invariant broke."""

    seed: int
    message: str


def run(seed: int, change: Callable[[World], None] | None = None) -> Failure | None:
    """Live through one schedule. change: applied to the world before it begins."""
    with _quiet():
        world = World(seed)
        if change is not None:
            change(world)
        return _lived(world)


def trace(seed: int) -> tuple[list[str], Failure | None]:
    """As `run`, and what happened, line by line."""
    with _quiet():
        world = World(seed, tracing=True)
        failure = _lived(world)
    return world.lines, failure


def _lived(world: World) -> Failure | None:
    try:
        world.run()
    except Broken as broken:
        return Failure(world.seed, str(broken))
    except Exception as error:  # noqa: BLE001 - a crash of the code under test is a finding, too
        return Failure(world.seed, world.invariants.broken or f"{type(error).__name__}: {error}")
    finally:
        world.end()
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """What controllers log of all that happens to them is no news here."""
    logger = logging.getLogger("stretto.controller")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
