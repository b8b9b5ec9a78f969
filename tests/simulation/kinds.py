"""Every kind of fault, and of request that people make: one method each. `faults` says which of them come, and when."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from stretto_controller.core import events as ev
from stretto_controller.core.model import NodeState

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.worker import Worker
    from simulation.world import World


class Kinds(ABC):
    """What can be done to one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        # Everything has healed, and nothing more comes.
        self.over = False
        # What has happened, and how often: for statistics.
        self.counts: Counter[str] = Counter()
        # These cannot reach each other, and never will.
        self.apart_for_good: list[tuple[str, str]] = []
        self._frozen_for_good: list[Worker] = []
        # At whose moment it is, if it is at somebody's.
        self._victim: Worker | None = None

    @abstractmethod
    def join(self) -> str | None:
        """A new node, unless there may be no more. Its name."""

    # -- processes and machines

    def _worker(self) -> Worker | None:
        """Mostly the one at whose moment it is."""
        rng, alive = self.world.rng, self.world.live_workers()
        if self._victim is not None and self._victim.alive and rng.random() < 0.7:
            return self._victim
        return rng.choice(alive) if alive else None

    def _agent(self) -> Agent | None:
        rng = self.world.rng
        if self._victim is not None and self._victim.agent.alive and rng.random() < 0.7:
            return self._victim.agent
        alive = [agent for agent in self.world.agents if agent.alive]
        return rng.choice(alive) if alive else None

    def _kill_worker(self) -> None:
        worker = self._worker()
        if worker is not None:
            self.kill_worker(worker)

    def kill_worker(self, worker: Worker) -> None:
        if worker.alive:
            self.counts["worker killed"] += 1
            worker.kill()

    def _sigterm_worker(self) -> None:
        worker = self._worker()
        if worker is not None:
            self.counts["worker had SIGTERM"] += 1
            worker.sigterm()

    def _kill_node(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.kill_node(agent.node_id)

    def kill_node(self, node_id: str) -> None:
        for agent in self.world.agents:
            if agent.node_id == node_id and agent.alive:
                self.counts["node killed"] += 1
                agent.kill()

    def _power_off(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.power_off(agent.node_id)

    def power_off(self, node_id: str) -> None:
        """The machine loses power: nothing there closes a connection."""
        self.counts["machine without power"] += 1
        self.world.network.dark.add(node_id)
        for other in self.world.agents:
            if other.node_id == node_id:
                other.kill(silently=True)

    def _freeze_workers(self) -> None:
        worker = self._worker()
        if worker is not None:
            duration_s = self._duration_s(for_good=0.15)
            for each in [worker] if self.world.rng.random() < 0.6 else worker.agent.workers:
                self.freeze(each, duration_s)

    def freeze(self, worker: Worker, duration_s: float) -> None:
        """SIGSTOP; inf: it is never continued."""
        if not worker.alive:
            return
        if not worker.stream.was_answered:
            # Nobody but a person can tell a process that hangs before it was ever heard from one that takes long.
            duration_s = min(duration_s, 10.0)
        self.counts["worker frozen"] += 1
        worker.freeze()
        if duration_s == math.inf:
            self._frozen_for_good.append(worker)
        self._later(duration_s, worker.thaw)

    def _freeze_node(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.counts["node frozen"] += 1
            duration_s = self._duration_s()
            agent.freeze()
            self._later(duration_s, agent.thaw)
            for worker in agent.workers:
                if worker.alive:
                    worker.freeze()
                    self._later(duration_s + self.world.rng.random() * 0.01, worker.thaw)

    def _freeze_agent(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.counts["agent frozen"] += 1
            agent.freeze()
            self._later(self._duration_s(), agent.thaw)

    def _hang(self) -> None:
        """The training thread does not come back from its own part of a step; the process lives on and speaks."""
        worker = self._worker()
        if worker is not None:
            self.counts["training thread hung"] += 1
            worker.hang(self._duration_s(for_good=0.15))

    def _sigterm(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.sigterm(agent)

    def sigterm(self, agent: Agent) -> None:
        if agent.alive and not self.over:
            self.counts["node had SIGTERM"] += 1
            agent.sigterm()

    def _cut_off(self) -> None:
        """A node and the controller cannot reach each other, or one of them not the other."""
        agent = self._agent()
        if agent is not None:
            directions = self.world.rng.choice(((0,), (1,), (0, 1), (0, 1)))
            self.cut_off([agent.node_id], directions, self._duration_s())

    def _cut_off_all_members(self) -> None:
        """The controller loses sight of a generation that trains on, and others come."""
        members = self.members()
        if members:
            self.cut_off(members, (0, 1), self.world.rng.uniform(3.0, 10.0))
            if self.world.rng.random() < 0.7:
                self.join()

    def members(self) -> list[str]:
        """The nodes whose workers are in some generation."""
        return list(dict.fromkeys(w.node_id for w in self.world.live_workers() if w.state.generation))

    def cut_off(self, names: list[str], directions: tuple[int, ...], duration_s: float) -> None:
        """Nothing passes between these nodes and the controller, in these directions; streams break in time."""
        rng = self.world.rng
        self.counts["cut off from the controller"] += 1
        cut = {(name, direction) for name in names for direction in directions}
        self.world.say("faults", "%s and the controller are cut off: %s", names, directions)
        self.world.network.cut_off |= cut
        for connection in self.world.controller.open_connections():
            if connection.speaker.node_id in names and rng.random() < 0.5:
                delays_s = rng.uniform(0.5, 8.0), rng.uniform(0.5, 8.0)
                connection.break_(client_delay_s=delays_s[0], controller_delay_s=delays_s[1])
        self._later(duration_s, self.reconnect, cut)

    def reconnect(self, cut: set[tuple[str, int]]) -> None:
        """The opposite of `cut_off`."""
        self.world.say("faults", "the controller can be reached again: %s", sorted(cut))
        self.world.network.cut_off -= cut
        self.world.links_changed()

    def _partition(self) -> None:
        """Some nodes cannot reach some others, or not in one direction."""
        rng = self.world.rng
        names = sorted({agent.node_id for agent in self.world.agents if agent.alive})
        if len(names) < 2:
            return
        self.counts["partition among nodes"] += 1
        rng.shuffle(names)
        split = rng.randint(1, len(names) - 1)
        one, other = names[:split], names[split:]
        if rng.random() < 0.5:
            one, other = one[:1], other[:1]
        pairs = [(a, b) for a in one for b in other]
        if rng.random() < 0.6:
            pairs += [(b, a) for a, b in pairs]
        self.world.say("faults", "nothing passes: %s", pairs)
        for pair in pairs:
            self.world.network.cut(*pair)
        self._later(self._duration_s(), self._heal, pairs)

    def _heal(self, pairs: list[tuple[str, str]]) -> None:
        self.world.say("faults", "passes again: %s", pairs)
        for pair in pairs:
            if pair not in self.apart_for_good:
                self.world.network.heal(*pair)
        self.world.links_changed()

    def part_for_good(self, pairs: list[tuple[str, str]]) -> None:
        """Nothing passes there any more, whatever heals."""
        self.counts["nodes apart for good"] += 1
        self.world.say("faults", "nothing will ever pass: %s", pairs)
        self.apart_for_good += pairs
        for pair in pairs:
            self.world.network.cut(*pair)

    def outage(self, duration_s: float) -> None:
        """The controller's network is away: all streams end within moments, and none opens meanwhile."""
        self.world.invariants.outage()
        self.blip(1.0)
        names = [agent.node_id for agent in self.world.agents if agent.alive]
        self.cut_off(names, (0, 1), duration_s)

    def _blip(self) -> None:
        self.blip(0.85)

    def blip(self, share: float) -> None:
        """The controller's network fails for a moment: most streams break together."""
        rng = self.world.rng
        self.counts["blip of the controller's network"] += 1
        self.world.say("faults", "a blip")
        for connection in self.world.controller.open_connections():
            if rng.random() < share:
                delay_s = rng.random() * 0.5
                connection.break_(client_delay_s=delay_s + rng.random() * 0.1, controller_delay_s=delay_s)

    def _break_stream(self) -> None:
        """One stream breaks; the controller may notice late."""
        rng, connections = self.world.rng, self.world.controller.open_connections()
        if connections:
            self.counts["stream broken"] += 1
            connection = rng.choice(connections)
            self.world.say("faults", "the stream %s breaks", connection.session_id)
            late_s = rng.choice((0.001, 0.1, 3.0))
            connection.break_(client_delay_s=rng.random() * 0.1, controller_delay_s=rng.random() * late_s)

    def _kill_controller(self) -> None:
        rng = self.world.rng
        self.kill_controller(rng.choice((0.05, 0.5, 4.0)) * (0.5 + rng.random()), lose_disk=rng.random() < 0.04)

    def kill_controller(self, away_s: float, *, lose_disk: bool = False) -> None:
        """It starts again after `away_s`."""
        self.counts["controller killed"] += 1
        self.world.controller.crash(lose_disk=lose_disk)
        self._later(away_s, self.world.controller.start)

    def _add_node(self) -> None:
        self.join()

    def _person(self) -> None:
        rng, setup, controller = self.world.rng, self.world.setup, self.world.controller
        self.counts["person's request"] += 1
        match rng.randrange(4):
            case 0:
                controller.request(ev.PauseRequested())
                self._later(rng.uniform(0.1, 3.0), self._until_done, ev.ResumeRequested())
            case 1:
                controller.request(ev.ScaleRequested(rng.randint(setup.min_nodes, setup.max_nodes)))
            case 2:
                controller.request(ev.ResumeRequested())
            case _:
                nodes = controller.state.record.nodes.values() if controller.state is not None else ()
                present = [node.node_id for node in nodes if node.state is not NodeState.LOST]
                if present:
                    controller.request(ev.DrainRequested(rng.choice(present)))

    # -- in steps

    def _duration_s(self, *, for_good: float = 0.0) -> float:
        """for_good: how often there is no end to it."""
        rng = self.world.rng
        if for_good and rng.random() < for_good:
            return math.inf
        return rng.choice((0.02, 0.3, 1.5, 5.0, 12.0)) * (0.5 + rng.random())

    def _later(self, delay_s: float, call: Callable[..., object], *args: object) -> None:
        if delay_s < math.inf:
            self.world.scheduler.after(delay_s, call, *args)

    def _until_done(self, event: ev.Event) -> None:
        """People ask again while there is no controller."""
        if not self.world.controller.up:
            self._later(0.5, self._until_done, event)
        else:
            self.world.controller.request(event)
