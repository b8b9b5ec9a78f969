"""One generation's connections among its workers: collectives that succeed on all ranks, on some, or on none.

A collective completes on a rank when every rank has contributed and can still be heard. A rank that dies, freezes or is
cut off in that moment may have sent its part to some and not to others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulation.worker import Worker
    from simulation.world import World


@dataclass(slots=True, eq=False)
class Collective:
    """One operation of all ranks. source: the rank whose contribution the others wait for; -1: all wait for all."""

    index: int
    kind: str
    source: int
    duration_s: float
    contributions: dict[int, Any] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    # Ranks that somebody's part will never reach: it died before it had sent it.
    failed: set[int] = field(default_factory=set)


class Formation:
    """The wires of one generation, shared by all its members: those who met on one prefix of one leader's store."""

    def __init__(self, world: World, number: int, places: tuple[int, ...]) -> None:
        self.world = world
        self.number = number
        # The ports by rank: they tell processes apart, also those that followed each other in one seat.
        self.places = places
        self.members: dict[int, Membership] = {}
        self._collectives: list[Collective] = []

    def contribute(self, member: Membership, kind: str, content: Any, *, source: int, duration_s: float) -> Collective:
        """Begin the member's next operation."""
        index = member.next_index
        member.next_index += 1
        if index == len(self._collectives):
            self._collectives.append(Collective(index, kind, source, duration_s))
        collective = self._collectives[index]
        self.world.invariants.contributed(self, collective, kind, member, content)
        collective.contributions[member.rank] = content
        if len(collective.contributions) == len(self.places):
            self._complete_soon(collective)
        return collective

    def retry(self) -> None:
        """A link healed or a member thawed: what waited for it may complete now."""
        for collective in self._collectives[-2:]:
            if len(collective.contributions) == len(self.places):
                self._complete_soon(collective)

    def gone(self, member: Membership, *, died: bool) -> None:
        """The member has died, or left: the others notice as their connections to it end."""
        for rank, other in self.members.items():
            if rank != member.rank and other.open and self._linked(member, other):
                self.world.scheduler.after(self.world.notice_s(), self._notice, member, other, died)

    def _linked(self, one: Membership, other: Membership) -> bool:
        return self.world.network.linked(one.worker.node_id, other.worker.node_id)

    def _notice(self, gone: Membership, member: Membership, died: bool) -> None:
        if not member.open or not member.worker.alive:
            return
        self._settle(member, 0.5 if died else 0.95)
        if died:
            member.gone.add(gone.rank)
        member.break_()

    def _settle(self, member: Membership, chance: float) -> None:
        """What the member waits for is complete or has failed: its data had come already, or never will."""
        for collective in self._collectives[-2:]:
            over = member.rank in collective.done or member.rank in collective.failed
            waiting = member.rank in collective.contributions and not over
            whole = len(collective.contributions) == len(self.places)
            if waiting and whole and not member.broken and self.world.rng.random() < chance:
                self._done(collective, member)

    def _complete_soon(self, collective: Collective) -> None:
        rng = self.world.rng
        spread_s = 0.003 if rng.random() < 0.8 else 0.05
        for rank in range(len(self.places)):
            if rank not in collective.done:
                delay_s = collective.duration_s + rng.random() * spread_s
                self.world.scheduler.after(delay_s, self._complete, collective, rank)

    def _complete(self, collective: Collective, rank: int) -> None:
        """The moment at which this rank has all data, unless somebody's never came."""
        member = self.members[rank]
        over = rank in collective.done or rank in collective.failed
        if over or not member.open or member.broken or not member.worker.alive:
            return
        needed = self.members if collective.source < 0 else (collective.source,)
        for other_rank in needed:
            other = self.members[other_rank]
            if other_rank == rank or (other.worker.runs and self._linked(member, other)):
                continue
            if self.world.rng.random() < 0.5:
                if not other.worker.alive:
                    collective.failed.add(rank)
                return
        self._done(collective, member)

    def _done(self, collective: Collective, member: Membership) -> None:
        collective.done.add(member.rank)
        # Who sends is done with it before anyone has it.
        if member.rank != collective.source and len(collective.done - {collective.source}) == 1:
            self.world.faults.moment(f"first-{collective.kind}", member.worker)
        member.worker.poke()


class Membership:
    """One rank's end of the formation: `stretto.group.Group`."""

    def __init__(self, formation: Formation, rank: int, worker: Worker) -> None:
        self.formation = formation
        self.rank = rank
        self.worker = worker
        self.next_index = 0
        # It has not left.
        self.open = True
        # A peer has died or left, or the controller has cut the generation: no operation completes any more.
        self.broken = False
        self.gone: set[int] = set()
        # Since when this rank has been waiting for an operation.
        self.waiting_since_s: float | None = None
        formation.members[rank] = self

    def break_(self) -> None:
        if not self.broken:
            self.broken = True
            self.worker.poke()

    def abandon(self) -> None:
        """Leave: this rank's connections end."""
        if self.open:
            self.open = False
            self.broken = True
            self.formation.gone(self, died=False)
