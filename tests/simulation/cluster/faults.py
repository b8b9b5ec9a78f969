"""What goes wrong with controllers, etcd and the network between them, drawn from the seed until everything heals.

Some faults come at a random time; others lie in wait for a moment: right after a decision was handed to the store
(`decided`), was written there (`applied`), or was sent to an agent (`told`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from simulation.cluster.invariants import LEASE_S, PREFIX
from simulation.cluster.members import MEMBERS
from simulation.cluster.nodes import Node
from stretto_controller.store.etcd.layout import Keys

if TYPE_CHECKING:
    from simulation.cluster.process import Process
    from simulation.cluster.world import World

MOMENTS = ("decided", "applied", "told")
_AMBUSHES = 0.5
# So many schedules have a chain of faults as well, of those that thin faults of ours would survive otherwise.
_CHAINS = 0.3
_NODE_LIMIT = 6


class Faults:
    """One schedule's troubles."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.over = False
        self.counts: Counter[str] = Counter()
        self._ambushes: list[list[object]] = []
        self._nodes = 0

    def plan(self) -> None:
        """Draw the faults. Schedules differ in kind, too: each has only some of all kinds."""
        world, rng, setup = self.world, self.world.rng, self.world.setup
        of_controllers: list[Callable[[Process], None]] = [self._kill]
        elsewhere: list[Callable[[], None]] = [
            self._fail_workers,
            self._fail_workers,
            self._break_stream,
            self._come_or_go,
        ]
        if setup.etcd:
            of_controllers += [self._kill, self._freeze, self._freeze, self._cut_from_etcd, self._cut_from_clients]
            of_controllers += [self._end_lease, self._cut_from_member]
            elsewhere += [self._kill_member, self._freeze_member, self._compact, self._compact, self._lose_majority]
        kinds = rng.sample(of_controllers, rng.randint(1, min(3, len(of_controllers))))
        others = rng.sample(elsewhere, rng.randint(1, 4))
        for _ in range(setup.faults):
            if rng.random() < _AMBUSHES:
                self._ambushes.append([rng.choice(MOMENTS), rng.randint(0, 25), rng.choice(kinds)])
            elif rng.random() < 0.4:
                world.scheduler.after(rng.uniform(0.5, setup.active_s), self._strike, rng.choice(kinds))
            else:
                world.scheduler.after(rng.uniform(0.5, setup.active_s), self._happen, rng.choice(others))
        if setup.etcd and rng.random() < _CHAINS:
            rng.choice((self._watches_fall_behind, self._agents_return_to_a_leader_cut_off))()
        # Generations change for reasons of their own, too.
        for _ in range(rng.randint(1, 6)):
            world.scheduler.after(rng.uniform(1.0, setup.active_s), self._happen, self._fail_workers)

    def moment(self, name: str, number: int) -> None:
        """Controller `number` is at this point."""
        for ambush in list(self._ambushes):
            moment, count, kind = ambush
            if moment != name or self.over:
                continue
            assert isinstance(count, int)
            ambush[1] = count - 1
            if count == 0:
                self._ambushes.remove(ambush)
                assert callable(kind)
                kind(self.world.processes[number])

    def end(self) -> None:
        """Everything heals."""
        world = self.world
        self.over = True
        self._ambushes.clear()
        world.say("faults", "end")
        world.members.heal()
        for process in world.processes:
            process.cut_off = 0
            while process.frozen:
                process.thaw()
            process.start()
        world.setup.lossy = 0.0
        while sum(node.alive for node in world.nodes) < world.setup.min_nodes:
            self.join()

    def join(self) -> None:
        self._nodes += 1
        self.world.nodes.append(Node(self.world, f"n{self._nodes}"))

    # -- chains

    def _watches_fall_behind(self) -> None:
        """etcd is compacted and restarted, so that every watch asks for what is gone; later the leader dies."""
        world, begins_s = self.world, self.world.rng.uniform(2.0, 4.0)
        world.setup.active_s = max(world.setup.active_s, begins_s + 18.0)

        def restart() -> None:
            self._compact()
            for member in range(MEMBERS):
                world.members.kill(member)
                world.scheduler.after(0.2, world.members.start, member)

        def kill() -> None:
            for process in world.processes:
                if process.ready and not self.over:
                    self._blamed(process)
                    process.kill()
                    world.scheduler.after(9.0, process.start)

        world.scheduler.after(begins_s, self._happen, restart)
        world.scheduler.after(begins_s + 7.0, self._happen, kill)

    def _agents_return_to_a_leader_cut_off(self) -> None:
        """It believes in its lease as long as it may; whoever comes then is answered, or told to ask another."""
        world, rng = self.world, self.world.rng
        begins_s = rng.uniform(2.0, world.setup.active_s - LEASE_S - 2.0)

        def cut() -> None:
            for process in world.processes:
                if process.ready:
                    self._cut(process, range(MEMBERS))

        def come_back() -> None:
            for node in world.nodes:
                node.break_stream()

        world.scheduler.after(begins_s, self._happen, cut)
        for _ in range(4):
            world.scheduler.after(begins_s + LEASE_S + rng.uniform(-0.5, 1.0), self._happen, come_back)

    # -- the kinds of faults

    def _strike(self, kind: Callable[[Process], None]) -> None:
        """Mostly the leader."""
        if self.over:
            return
        world, rng = self.world, self.world.rng
        leading = [process for process in world.processes if process.ready]
        kind(leading[0] if leading and rng.random() < 0.7 else rng.choice(world.processes))

    def _happen(self, kind: Callable[[], None]) -> None:
        if not self.over:
            kind()

    def _later(self, call: Callable[[], None]) -> None:
        """For a moment, for about as long as a lease lives, or for long."""
        rng = self.world.rng
        delays_s = rng.uniform(0.05, 1.0), rng.uniform(LEASE_S - 1.0, LEASE_S + 1.5), rng.uniform(3.0, 8.0)
        self.world.scheduler.after(rng.choice(delays_s), call)

    def _blamed(self, process: Process) -> None:
        """Until now nobody could know that this one would not decide."""
        self.world.invariants.excused_s = self.world.scheduler.now_s

    def _kill(self, process: Process) -> None:
        if process.up:
            self.counts["controller killed"] += 1
            self._blamed(process)
            process.kill()
            self._later(process.start)

    def _freeze(self, process: Process) -> None:
        if process.up:
            self.counts["controller frozen"] += 1
            self._blamed(process)
            process.freeze()
            self._later(partial(self._thaw, process, process.life))

    def _thaw(self, process: Process, life: int) -> None:
        if process.life == life:
            process.thaw()

    def _cut_from_etcd(self, process: Process) -> None:
        self._cut(process, range(MEMBERS))

    def _cut_from_member(self, process: Process) -> None:
        self._cut(process, [self.world.rng.randrange(MEMBERS)])

    def _cut(self, process: Process, members: range | list[int]) -> None:
        self.counts["controller cut from etcd"] += 1
        self.world.say("faults", "c%d is cut off from %s", process.number, list(members))
        self._blamed(process)
        for member in members:
            self.world.members.cut[process.number, member] += 1
        # Agents that come back then are answered by who leads, or by who believes that it does.
        for _ in range(self.world.rng.choice((0, 1, 3))):
            self.world.scheduler.after(LEASE_S + self.world.rng.uniform(-1.0, 1.5), self._happen, self._break_stream)
        self._later(partial(self._reach_again, process, members))

    def _reach_again(self, process: Process, members: range | list[int]) -> None:
        process.steady_since_s = self.world.scheduler.now_s
        for member in members:
            pair = process.number, member
            self.world.members.cut[pair] = max(0, self.world.members.cut[pair] - 1)

    def _cut_from_clients(self, process: Process) -> None:
        """It leads on, and nobody hears it."""
        self.counts["controller cut from clients"] += 1
        self.world.say("faults", "c%d is cut off from its clients", process.number)
        process.cut_off += 1
        self._later(partial(self._heard_again, process))

    def _heard_again(self, process: Process) -> None:
        process.cut_off = max(0, process.cut_off - 1)

    def _end_lease(self, process: Process) -> None:
        """Somebody revokes the leader's lease, or etcd has forgotten it."""
        leader = self.world.members.keyspace.value(Keys(PREFIX).leader)
        if leader is not None and self.world.members.serving:
            self.counts["lease revoked"] += 1
            self.world.say("faults", "lease %d is revoked", leader.lease)
            self._blamed(process)
            self.world.invariants.revoked.add(leader.create_revision)
            self.world.members.keyspace.revoke(leader.lease)

    def _kill_member(self) -> None:
        members = self.world.members
        member = members.leader if self.world.rng.random() < 0.5 else self.world.rng.randrange(MEMBERS)
        if member not in members.down:
            self.counts["etcd member killed"] += 1
            self.world.say("faults", "etcd's member %d is killed", member)
            members.kill(member)
            self._later(partial(members.start, member))

    def _freeze_member(self) -> None:
        members = self.world.members
        member = members.leader if self.world.rng.random() < 0.5 else self.world.rng.randrange(MEMBERS)
        self.counts["etcd member frozen"] += 1
        self.world.say("faults", "etcd's member %d is frozen", member)
        members.freeze(member)
        self._later(partial(members.thaw, member))

    def _lose_majority(self) -> None:
        """etcd is down, or restarts."""
        self.counts["etcd down"] += 1
        self.world.say("faults", "etcd is down")
        for member in range(MEMBERS):
            if member not in self.world.members.down:
                self.world.members.kill(member)
                self._later(partial(self.world.members.start, member))

    def _compact(self) -> None:
        if self.world.members.serving:
            self.counts["compaction"] += 1
            self.world.members.keyspace.compact()

    def _fail_workers(self) -> None:
        nodes = [node for node in self.world.nodes if node.alive and node.answered]
        if nodes:
            self.counts["workers failed"] += 1
            self.world.rng.choice(nodes).ask(failed=True)

    def _break_stream(self) -> None:
        nodes = [node for node in self.world.nodes if node.alive]
        if nodes:
            self.counts["stream broken"] += 1
            self.world.rng.choice(nodes).break_stream()

    def _come_or_go(self) -> None:
        nodes = [node for node in self.world.nodes if node.alive]
        if len(nodes) > 1 and self.world.rng.random() < 0.5:
            self.counts["node gone"] += 1
            self.world.rng.choice(nodes).leave()
        elif self._nodes < _NODE_LIMIT:
            self.join()
