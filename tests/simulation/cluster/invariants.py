"""What must hold while several controllers share an etcd, or one keeps its word on a disk, in the words of design.md.

One history of generations without forks; no two leaders' writes interleaved; what was acknowledged is kept; nothing is
done twice; a new leader decides within the lease's time and a second.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from simulation.cluster.keyspace import Write
from simulation.cluster.nodes import JOB
from simulation.cluster.people import Person
from stretto_controller.core.model import Generation, Record
from stretto_controller.settings import EtcdSettings
from stretto_controller.store.codec import decode
from stretto_controller.store.contents import GenerationSummary, Save, Stored, StoredEvent
from stretto_controller.store.etcd.layout import Keys, Layout
from stretto_controller.store.etcd.store import EtcdStore
from stretto_proto.v1 import rendezvous_pb2 as rendezvous

if TYPE_CHECKING:
    from simulation.cluster.nodes import Node
    from simulation.cluster.process import Process
    from simulation.cluster.world import World

PREFIX = EtcdSettings().prefix
LEASE_S = EtcdSettings().lease_s
# After a fault a follower needs so long to follow again: its watch is begun anew, its channels are opened.
_STEADY_S = 4.0
_KEYS = Keys(PREFIX)


class Broken(Exception):
    """An invariant does not hold."""


class Invariants:
    """Looks at each write as the store carries it out, and at each word as it leaves a controller."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.generations: dict[int, Generation] = {}
        self.terms = 0
        self.writes = 0
        # What breaks inside a callback that may not raise is raised by `World`.
        self.broken: str | None = None
        # Terms that somebody ended by force.
        self.revoked: set[int] = set()
        self._term = 0
        self._requests: set[bytes] = set()
        self._sequences: dict[int, str] = {}
        self._records: dict[str, Record] = {}
        # By node: what each of its requests was answered with, and the newest generation that it was told.
        self._answers: dict[tuple[str, int], int] = {}
        self._newest: dict[str, int] = {}
        self._first_members: dict[int, tuple[str, int, float]] = {}
        self._decided_s = 0.0
        # Since when nobody can be blamed that none decides: the latest fault of a leader.
        self.excused_s = 0.0

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken = self.broken or what
            raise Broken(self.broken)

    def crashed(self, what: str) -> None:
        """An exception that nobody caught."""
        self.broken = self.broken or what

    # -- what is written

    def etcd_written(self, write: Write) -> None:
        """A transaction was carried out."""
        puts = {key: (value, before) for key, value, before in write.puts}
        if _KEYS.last_save not in puts:
            return
        request_id, _ = puts[_KEYS.last_save]
        self.writes += 1
        self.require(request_id not in self._requests, f"the write {request_id!r} was done twice")
        self._requests.add(request_id)
        term = int(request_id.split(b"-")[0])
        self.require(term >= self._term, f"term {term} wrote after term {self._term}: two leaders' writes interleave")
        self.terms += term > self._term
        self._term = term
        leader = self.world.members.keyspace.value(_KEYS.leader)
        self.require(
            leader is not None and leader.create_revision == term, f"term {term} wrote, and does not lead any more"
        )
        for key, (value, before) in puts.items():
            kind, _, rest = key.decode().removeprefix(PREFIX).partition("/")
            if kind == "events":
                self.require(before is None, f"the events {rest} were written twice")
                for line in value.decode().split("\n"):
                    self._event_written(rest.partition("/")[0], decode(StoredEvent, line))
            elif kind == "jobs":
                self._record_written(decode(Record, value.decode().split("\n")[1]))
            elif kind == "generations":
                self._generation_written(rest.partition("/")[0], decode(GenerationSummary, value.decode()))
        for key in write.deleted:
            if key.startswith(_KEYS.job("")):
                self._records.pop(key.decode().removeprefix(_KEYS.job("").decode()), None)

    def disk_written(self, saves: list[Save]) -> None:
        """The disk's writer commits these together."""
        self.writes += 1
        for save in saves:
            for event in save.events:
                self._event_written(save.job, event)
            if save.record is not None:
                self._record_written(save.record)
            for summary in save.generations:
                self._generation_written(save.job, summary)
            if save.forget:
                self._records.pop(save.job, None)

    def _event_written(self, job: str, event: StoredEvent) -> None:
        text = f"{job}: {event.kind}: {event.reason}"
        self.require(
            event.sequence not in self._sequences,
            f"event {event.sequence} is {self._sequences.get(event.sequence)!r} and {text!r}",
        )
        self._sequences[event.sequence] = text

    def _record_written(self, record: Record) -> None:
        before = self._records.get(record.name)
        self._records[record.name] = record
        if before is None:
            return
        self.require(
            record.next_generation >= before.next_generation and record.incarnation >= before.incarnation,
            f"{record.name} went back from generation {before.next_generation} to {record.next_generation}",
        )

    def _generation_written(self, job: str, summary: GenerationSummary) -> None:
        if job == JOB:
            self._generation(summary.generation)

    def _generation(self, generation: Generation) -> None:
        known = self.generations.setdefault(generation.number, generation)
        self.require(
            known.members == generation.members and known.scale == generation.scale,
            f"generation {generation.number} forks: {known.members} and {generation.members}",
        )

    # -- what is said

    def spoke(self, process: Process) -> None:
        """A controller writes on an agent's stream."""
        store = process.store
        if not isinstance(store, EtcdStore):
            return
        leader = self.world.members.keyspace.value(_KEYS.leader)
        mine = store._election.create_revision
        self.require(
            # Whose lease was revoked cannot know before its next write, which is refused.
            mine in self.revoked or (leader is not None and leader.create_revision == mine),
            f"c{process.number} speaks in term {mine}, and the lead is {leader.create_revision if leader else 'free'}",
        )

    def assigned(self, node: Node, assignment: rendezvous.NodeAssignment) -> None:
        """An agent hears its generation."""
        number = assignment.generation.number
        request = (node.node_id, assignment.request_id)
        answered = self._answers.setdefault(request, number)
        self.require(
            answered == number, f"{node.node_id}'s request {request[1]} was answered with {answered} and {number}"
        )
        newest = self._newest.get(node.node_id, 0)
        self.require(number >= newest, f"{node.node_id} is told generation {number} after {newest}")
        self._newest[node.node_id] = number
        known = self.generations.get(number)
        self.require(known is not None, f"{node.node_id} is told generation {number}, which was never saved")
        assert known is not None
        told = {(member.node_id, member.node_rank) for member in assignment.generation.members}
        saved = {(member.node_id, member.node_rank) for member in known.members}
        self.require(
            told <= saved and node.node_id in {name for name, _ in told},
            f"generation {number} forks: {node.node_id} is told {sorted(told)}, saved is {sorted(saved)}",
        )

    # -- who decides

    def look(self) -> None:
        """Ten times a second: is there somebody who decides?"""
        world = self.world
        if self.broken:
            raise Broken(self.broken)
        now_s = world.scheduler.now_s
        ready = [process for process in world.processes if process.ready]
        # A leader that cannot reach etcd may believe in itself until its lease ends, and cannot save.
        if ready:
            self._decided_s = now_s
        if not world.setup.etcd or world.setup.lossy or not world.members.serving:
            self.excused_s = now_s
            return
        steady = [process.steady_since_s for process in world.processes if process.can_lead]
        if not steady:
            self.excused_s = now_s
            return
        begun_s = max(self._decided_s, self.excused_s, max(min(steady), world.members.steady_since_s) + _STEADY_S)
        self.require(
            now_s - begun_s <= LEASE_S + 1.0,
            f"nobody has decided for {now_s - begun_s:.1f} s, though c"
            f"{[process.number for process in world.processes if process.can_lead]} could lead",
        )

    # -- at the end

    def settled(self) -> bool:
        """Whether everything has come to rest after the faults."""
        world = self.world
        if not any(process.ready for process in world.processes) or not all(each.seen_last for each in world.people):
            return False
        nodes = [node for node in world.nodes if node.alive]
        record = self._records.get(JOB)
        if not nodes or record is None or record.generation is None:
            return not nodes
        members = {member.node_id for member in record.generation.members}
        wanted = min(len(nodes), world.setup.max_nodes)
        if len(nodes) < world.setup.min_nodes:
            return True
        current = {n.node_id for n in nodes if n.answered and n.generation == record.generation.number}
        return len(current) == wanted and current == members

    def at_the_end(self) -> None:
        """The history in the store is the one that everybody was told, and what was acknowledged is in it."""
        stored = self._stored()
        kept = {job.record.name: job for job in stored.jobs}
        for person in self.world.people:
            self._kept(person, kept[person.job].record.wanted_nodes if person.job in kept else None)
        for job in stored.jobs:
            sequences = [event.sequence for event in job.events]
            self.require(sequences == sorted(set(sequences)), f"{job.record.name}'s events are {sequences}")
            self._scales(job.record.name, [event.reason for event in job.events if event.kind == "scale_requested"])
        if JOB in kept:
            numbers = [summary.generation.number for summary in kept[JOB].generations]
            self.require(numbers == list(range(1, len(numbers) + 1)), f"the history is {numbers}")
            self.require(set(numbers) == set(self.generations), f"{numbers} are kept of {sorted(self.generations)}")
            for summary in kept[JOB].generations:
                self._generation(summary.generation)

    def _kept(self, person: Person, nodes: int | None) -> None:
        self.require(
            nodes in person.possible,
            f"{person.job} wants {nodes}; acknowledged was {sorted(map(str, person.possible))}",
        )

    def _scales(self, job: str, reasons: list[str]) -> None:
        """Each scaling begins where the one before ended: none was lost, none was done twice."""
        changes = [(int(words[0]), int(words[-1])) for words in (reason.split() for reason in reasons)]
        for (wanted, _), (_, instead) in pairwise(changes):
            self.require(instead == wanted, f"{job} was scaled to {wanted}, and then from {instead}")

    def _stored(self) -> Stored:
        world = self.world
        if not world.setup.etcd:
            return world.disk.load()
        service = world.setup.service
        layout = Layout(_KEYS, kept_events=service.kept_events, kept_generations=service.kept_generations)
        return layout.read(
            [pair for pair in world.members.keyspace.under(PREFIX.encode()) if pair[0] not in (_KEYS.last_save,)]
        )
