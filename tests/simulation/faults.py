"""What goes wrong, and what people ask for: drawn from the seed, until everything heals.

Some faults come at a random time. Others lie in wait for a moment of the protocol (`Faults.moment`): while a group is
being built, while the source sends, right after a collective has succeeded on one rank. `chains` puts several together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from simulation import chains
from simulation.kinds import Kinds
from stretto_controller.core import events as ev

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.worker import Worker
    from simulation.world import World

_COLLECTIVES = ("init", "transfer", "agree", "check", "step", "commit")
# "first-...": when the collective has succeeded on one rank, and on no other yet.
MOMENTS = (
    *_COLLECTIVES,
    *(f"first-{kind}" for kind in _COLLECTIVES),
    *("build", "moved", "save", "ask", "assigned", "cut", "begun"),
)
# What is called with the worker at whose moment it lay in wait; None: the controller's.
Ambush = Callable[["Worker | None"], None]
# So many of a schedule's faults wait for a moment rather than for a time.
_AMBUSHES = 0.4
# Nodes that come beyond those of the beginning.
_NODE_LIMIT = 7


class Faults(Kinds):
    """One schedule's troubles."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        # Streams open in the very moment at which something is said, always.
        self.says_twice = False
        self._ambushes: list[tuple[str, int, Ambush, bool]] = []
        self._nodes = len(world.setup.slots)

    def plan(self) -> None:
        """Draw the faults. Schedules differ in kind, too: each has only some of all kinds."""
        rng, setup = self.world.rng, self.world.setup
        everything: list[Callable[[], None]] = [
            self._kill_worker,
            self._kill_worker,
            self._kill_node,
            self._power_off,
            self._freeze_workers,
            self._freeze_node,
            self._freeze_agent,
            self._hang,
            self._sigterm,
            self._cut_off,
            self._cut_off_all_members,
            self._partition,
            self._partition,
            self._blip,
            self._break_stream,
            self._kill_controller,
            self._add_node,
            self._person,
            self._sigterm_worker,
        ]
        kinds = rng.sample(everything, rng.randint(1, 5))
        for _ in range(setup.faults):
            kind = rng.choice(kinds)
            if rng.random() < _AMBUSHES:
                self.lie_in_wait(rng.choice(MOMENTS), rng.randint(0, 12), partial(self._strike, kind))
            else:
                self.world.scheduler.after(rng.uniform(0.2, setup.active_s * 0.95), self._strike, kind)
        if setup.chain:
            chains.CHAINS[setup.chain](self)

    def lie_in_wait(self, moment: str, count: int, ambush: Ambush, *, at_once: bool = False) -> None:
        """Have `ambush` called when this moment comes for the `count`-th time, counted from 0, with whose it is.

        at_once: before anything else happens, rather than while the moment's consequences may be under way.
        """
        assert moment in MOMENTS, moment
        self._ambushes.append((moment, count, ambush, at_once))

    def moment(self, name: str, worker: Worker | None) -> None:
        """The worker is at this point of the protocol; None: the controller is."""
        if not self._ambushes or self.over:
            return
        left = []
        due = []
        for moment, count, ambush, at_once in self._ambushes:
            if moment != name:
                left.append((moment, count, ambush, at_once))
            elif count > 0:
                left.append((moment, count - 1, ambush, at_once))
            else:
                due.append((ambush, at_once))
        self._ambushes = left
        for ambush, at_once in due:
            delay_s = 0.0 if at_once else self.world.rng.choice((0.0, 0.0, 0.001, 0.003, 0.02))
            self.world.scheduler.after(delay_s, self._spring, ambush, worker)

    def end(self) -> None:
        """The network heals, who is frozen goes on or dies, the controller is back, people undo what they asked for."""
        world, rng = self.world, self.world.rng
        self.over = True
        self._ambushes.clear()
        world.say("faults", "end")
        world.network.heal_all()
        for pair in self.apart_for_good:
            world.network.cut(*pair)
        for worker in world.live_workers():
            if worker not in self._frozen_for_good:
                worker.thaw()
        for agent in world.agents:
            agent.thaw()
        world.controller.start()
        world.links_changed()
        if rng.random() < 0.9:
            self._until_done(ev.ResumeRequested())
        if rng.random() < 0.9:
            for _ in range(max(0, world.setup.min_nodes - self.able_nodes())):
                self.join()

    def able_nodes(self) -> int:
        """How many nodes could train together, if they are let."""
        able = {agent.node_id for agent in self.world.agents if agent.alive and not agent.leaving}
        return len(able) - any(one in able and other in able for one, other in self.apart_for_good)

    def agent_ended(self, agent: Agent) -> None:
        """Somebody starts it again, or not."""
        rng = self.world.rng
        if self.world.invariants.job_has_ended:
            return
        if self.over:
            # Who failed is replaced by a new node for as long as the job needs it.
            if agent.exit_code != 0 and self._nodes < 3 * _NODE_LIMIT:
                self.world.scheduler.after(rng.uniform(0.1, 2.0), self.join)
        elif rng.random() < 0.7:
            if rng.random() < 0.5:
                self.world.scheduler.after(rng.uniform(0.05, 3.0), self._return, agent)
            else:
                self.world.scheduler.after(rng.uniform(0.05, 3.0), self.join)

    def _spring(self, ambush: Ambush, worker: Worker | None) -> None:
        if not self.over:
            ambush(worker)

    def _strike(self, kind: Callable[[], None], victim: Worker | None = None) -> None:
        if not self.over:
            self._victim = victim
            kind()
            self._victim = None

    def join(self) -> str | None:
        """A new node, unless the job has ended or there were many already. Its name."""
        if self.world.invariants.job_has_ended:
            return None
        if self._nodes >= 3 * _NODE_LIMIT or not (self.over or self._nodes < _NODE_LIMIT):
            return None
        self._nodes += 1
        self.counts["node added"] += 1
        self.world.add_node(f"n{self._nodes}", self.world.rng.choice(self.world.setup.slots))
        return f"n{self._nodes}"

    def _return(self, agent: Agent) -> None:
        """The same node again: a new agent with the old name, and a key of its own."""
        if self.world.invariants.job_has_ended:
            return
        if not any(other.alive and other.node_id == agent.node_id for other in self.world.agents):
            self.counts["node returned"] += 1
            self.world.add_node(agent.node_id, agent.slots)
