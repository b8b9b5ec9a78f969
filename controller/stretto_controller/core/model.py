"""What the controller knows of one job: frozen values, the durable part (`Record`) apart from the rest (`Live`).

A decision that changes the record is saved before its actions are sent; `Live` is rebuilt after a crash.
All times are monotonic seconds of the controller's own clock, and only `Live` holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from stretto_controller.core.errors import Rejected
from stretto_controller.core.goodput.autoscale import Autoscale
from stretto_controller.core.goodput.measured import Measured
from stretto_controller.core.goodput.prediction import Recommendation
from stretto_controller.core.goodput.review_state import Review
from stretto_controller.core.report import NO_PACE, Checkpoint, Pace, Progress
from stretto_controller.core.roster import Roster


class Phase(StrEnum):
    """Where a job stands; docs/protocol.md draws the transitions."""

    PENDING = "pending"
    FORMING = "forming"
    RUNNING = "running"
    RECONFIGURING = "reconfiguring"
    PAUSED = "paused"
    # Fewer nodes than min_nodes are left, and they keep the state in memory (in-process mode only).
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        return self in FINISHED


FINISHED = (Phase.SUCCEEDED, Phase.FAILED)


class NodeState(StrEnum):
    JOINING = "joining"
    SPARE = "spare"
    ACTIVE = "active"
    DRAINING = "draining"
    LOST = "lost"


class Mode(StrEnum):
    RESTART = "restart"
    IN_PROCESS = "in-process"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a job asks for. Zero means "not said yet"; what was said first binds everyone who comes later."""

    min_nodes: int = 0
    max_nodes: int = 0
    mode: Mode | None = None
    base_batch_size: int = 0
    batch_size: int = 0
    global_batch_size: int = 0
    target_tau: float = 0.0

    def validate(self) -> None:
        """Raise Rejected for a spec that no job can have."""
        for name in (
            "min_nodes",
            "max_nodes",
            "base_batch_size",
            "batch_size",
            "global_batch_size",
            "target_tau",
        ):
            value = getattr(self, name)
            if not 0 <= value < 2**53:
                raise Rejected.invalid(f"{name} is {value}; it must be a finite number of at least 0")
        if self.max_nodes and self.min_nodes < 1:
            raise Rejected.invalid(f"min_nodes is {self.min_nodes}; a job needs at least 1 node")
        if self.min_nodes > self.max_nodes:
            raise Rejected.invalid(
                f"min_nodes is {self.min_nodes} and max_nodes is {self.max_nodes}; give min_nodes <= max_nodes"
            )
        if (self.batch_size or self.global_batch_size) and not self.base_batch_size:
            raise Rejected.invalid("a batch size was given without base_batch_size; give both")

    def merged(self, other: JobSpec) -> JobSpec:
        """This spec completed by what `other` adds; Rejected where they contradict each other."""
        values = {}
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                raise Rejected.conflict(
                    f"{name} is {theirs} here, but the job runs with {name} {mine}; "
                    "use the job's own value, another job name, or delete the job first"
                )
            values[name] = mine or theirs
        merged = JobSpec(**values)
        merged.validate()
        return merged

    def scale(self, world_size: int) -> float:
        """S for a world of `world_size` workers; 0.0 while the batch sizes are not known."""
        if not self.base_batch_size:
            return 0.0
        if self.global_batch_size:
            return self.global_batch_size / self.base_batch_size
        return world_size * self.batch_size / self.base_batch_size


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Of a worker's state: the generation in which it last moved or was synchronised, and its step."""

    generation: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A live worker outside any generation asks for an assignment (in-process mode)."""

    request_id: int
    # The generation that it left last; 0 if none.
    generation: int = 0
    version: Version = Version()
    # That generation broke under it, rather than being left at an agreed step.
    failed: bool = False
    # Ranks of that generation which it could not reach.
    unreachable: tuple[int, ...] = ()
    store_port: int = 0
    preflight_port: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """A node without running workers asks for an assignment."""

    request_id: int
    generation: int = 0
    failed: bool = False
    exit_signal: int = 0
    restarts_left: int = -1
    master_port: int = 0
    store_port: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    node_id: str
    key_hash: str
    slots: int
    address: str
    order: int
    state: NodeState = NodeState.JOINING
    ready: Ready | None = None
    succeeded: bool = False
    answered_request: int = 0
    # A person asked for the drain. Without it, a DRAINING node that asks for work again takes part again.
    drain_requested: bool = False
    # In-process mode: its agent was told to end its workers, and has not said since that none runs.
    ending: bool = False
    # In-process mode: local ranks of its present workers that have spoken. One that falls silent hangs; one that never
    # spoke may still load. Kept over a restart, after which it would otherwise be taken for the latter.
    spoken: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seat:
    """One live worker's place in a generation (in-process mode)."""

    request_id: int
    store_port: int
    preflight_port: int


@dataclass(frozen=True, slots=True)
class Member:
    node_id: str
    node_rank: int
    slots: int
    first_rank: int
    address: str
    master_port: int = 0
    store_port: int = 0
    # By local rank; empty in restart mode.
    seats: tuple[Seat, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    number: int
    members: tuple[Member, ...]
    scale: float
    reason: str
    # tau when it began, as far as the controller had heard.
    first_tau: float = 0.0
    # In-process mode: whose state everyone takes. -1: nobody's, so rank 0 restores the newest checkpoint.
    source_rank: int = -1
    # All workers hold that state already.
    in_step: bool = False
    # Derived: asked for every node at every tick.
    _ids: frozenset[str] = field(init=False, repr=False, compare=False)
    # How many workers it has. Derived.
    world_size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", frozenset(member.node_id for member in self.members))
        object.__setattr__(self, "world_size", sum(member.slots for member in self.members))

    @property
    def node_ids(self) -> tuple[str, ...]:
        return tuple(member.node_id for member in self.members)

    def has(self, node_id: str) -> bool:
        return node_id in self._ids


class Cause(StrEnum):
    """Why a generation ended: the `reason` label of stretto_generation_changes_total."""

    START = "start"
    GROW = "grow"
    SHRINK = "shrink"
    DRAIN = "drain"
    NODE_LOST = "node_lost"
    WORKER_FAILED = "worker_failed"
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Change:
    """A change of membership under way. `planned`: members are well, and may leave at a step boundary."""

    cause: Cause
    reason: str
    planned: bool
    # The workers were asked to leave after a step.
    leaving: bool = False
    # ... and to write a checkpoint of it.
    save: bool = False
    # Members that were lost, or gave up, in the course of it: then nobody else's failure is its own fault.
    gone: tuple[str, ...] = ()
    # Members that drained and have gone already.
    drained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Farewell:
    """What an agent that was sent home was told."""

    node_id: str
    success: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """The durable part of a job."""

    name: str
    spec: JobSpec
    phase: Phase = Phase.PENDING
    reason: str = ""
    incarnation: int = 1
    desired_nodes: int = 0
    paused: bool = False
    autoscale: Autoscale = field(default_factory=Autoscale)
    measured: Measured = field(default_factory=Measured)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    next_order: int = 0
    generation: Generation | None = None
    next_generation: int = 1
    change: Change | None = None
    # A worker reported that the target is reached: members that go now are not missed.
    target_reached: bool = False
    checkpoint: Checkpoint | None = None
    # In-process mode: no state older than this may be given to others; training went on beyond it.
    lineage: Version = Version()
    # By their keys' hashes, agents that were sent home while the job goes on: the word may be lost with their streams.
    dismissed: Mapping[str, Farewell] = field(default_factory=dict)

    @property
    def in_process(self) -> bool:
        return self.spec.mode is Mode.IN_PROCESS

    @property
    def wanted_nodes(self) -> int:
        """How many nodes the job should have: what was asked for, within the spec."""
        return min(self.desired_nodes or self.spec.max_nodes, self.spec.max_nodes)


@dataclass(frozen=True, slots=True)
class Session:
    """A node's stream, as last seen."""

    session_id: str
    heard_s: float
    closed_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerSession:
    """A worker's stream, as last seen."""

    session_id: str
    node_id: str
    local_rank: int
    # In the current generation; -1 and 0 for one that is in none.
    rank: int
    generation: int
    heard_s: float
    closed_s: float | None = None
    # Restart mode: after the agreed step. In-process mode: it was told to save what nobody else keeps, and to exit.
    left: bool = False
    ready: WorkerReady | None = None
    # Since when it was told that its generation is broken, and has not asked for the next one; or was told to exit.
    cut_s: float | None = None
    # In its present generation; as it said at paced_s, or is expected to say since then.
    pace: Pace = NO_PACE
    paced_s: float = 0.0
    # The latest step at which it was named as slow.
    slow_step: int = 0

    @property
    def closed(self) -> bool:
        return self.closed_s is not None


@dataclass(frozen=True, slots=True)
class Apart:
    """How long two nodes are kept apart, this time."""

    until_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Live:
    """What is known only while this controller runs."""

    sessions: Mapping[str, Session] = field(default_factory=dict)
    workers: Roster = field(default_factory=Roster)
    progress: Progress | None = None
    progress_s: float = 0.0
    step: int = 0
    step_advanced_s: float | None = None
    # FORMING, or a planned growth: no earlier than this, unless all who are wanted are there.
    settle_until_s: float | None = None
    settle_limit_s: float | None = None
    # The newest join that the settle time has seen.
    settle_order: int = -1
    # Workers, then agents, must have answered the change by then.
    change_limit_s: float | None = None
    # When a member reported that its workers failed in the current generation.
    failure_s: float | None = None
    # Until when those who were not heard since then may answer; None: the usual time.
    roll_call_until_s: float | None = None
    # The last node that was there gave up.
    gave_up: bool = False
    # Since the workers of the last generation began to stop; None before the first generation.
    pause_started_s: float | None = None
    # From then to the first committed step of this generation; None until that step.
    pause_s: float | None = None
    # Why the current generation began.
    cause: Cause | None = None
    # WAITING: when the survivors give up.
    waiting_until_s: float | None = None
    # Until then a node that keeps the newest state, but cannot take part yet, is waited for.
    holder_until_s: float | None = None
    # Pairs of nodes that could not reach each other.
    apart: Mapping[frozenset[str], Apart] = field(default_factory=dict)
    # Nobody is judged by silence before this.
    grace_until_s: float | None = None
    # Somebody waits to hear that a checkpoint is there.
    save_asked: bool = False
    # When the target was reached, as far as this controller saw it.
    target_s: float | None = None
    # When this controller began to watch the job.
    watched_s: float = 0.0
    # What the latest review of its size came to.
    recommendation: Recommendation | None = None
    review: Review = field(default_factory=Review)
    ticked_s: float | None = None


@dataclass(frozen=True, slots=True)
class JobState:
    record: Record
    live: Live = field(default_factory=Live)
