"""What can happen to a job. Every event is a frozen value; times come with `step`, not with the event."""

from __future__ import annotations

from dataclasses import dataclass, field

from stretto_controller.core.goodput.autoscale import AutoscaleChange
from stretto_controller.core.model import JobSpec, Ready, WorkerReady
from stretto_controller.core.report import NO_PACE, Checkpoint, Pace, Progress


@dataclass(frozen=True, slots=True)
class JobCreated:
    """A person or a tool creates the job before any node comes."""

    spec: JobSpec
    desired_nodes: int = 0
    autoscale: AutoscaleChange = field(default_factory=AutoscaleChange)


@dataclass(frozen=True, slots=True)
class NodeHello:
    """A node opens a stream: its first, or again after a break. Creates the job if there is none."""

    node_id: str
    key_hash: str
    session_id: str
    slots: int
    address: str
    spec: JobSpec
    # Of its running workers; 0 if none run.
    generation: int = 0
    ready: Ready | None = None


@dataclass(frozen=True, slots=True)
class NodeHeartbeat:
    node_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class NodeReady:
    node_id: str
    session_id: str
    ready: Ready


@dataclass(frozen=True, slots=True)
class NodeSucceeded:
    """All workers of the node ended well in `generation`."""

    node_id: str
    session_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """The agent says goodbye. failed: its workers failed and it gives up; succeeded: it is done; else it drains."""

    node_id: str
    session_id: str
    failed: bool = False
    succeeded: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class StreamClosed:
    node_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class WorkerHello:
    session_id: str
    node_id: str
    local_rank: int
    # In the generation that it runs in; -1 and 0 if it runs in none.
    rank: int
    generation: int
    spec: JobSpec
    ready: WorkerReady | None = None


@dataclass(frozen=True, slots=True)
class WorkerStreamClosed:
    session_id: str


@dataclass(frozen=True, slots=True)
class WorkerAlive:
    """A heartbeat, or the answer to a cut."""

    session_id: str
    pace: Pace = NO_PACE


@dataclass(frozen=True, slots=True)
class WorkerAsked:
    """A live worker has left its generation, or lost it, and asks for the next one."""

    session_id: str
    ready: WorkerReady


@dataclass(frozen=True, slots=True)
class WorkerProgressed:
    session_id: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """The worker left its generation after the agreed step and waits to be stopped."""

    session_id: str
    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerFinished:
    session_id: str
    generation: int
    step: int
    tau: float


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker was asked to go (SIGTERM): its node drains."""

    session_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    session_id: str
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """A save came to nothing; the checkpoint before it is as it was."""

    session_id: str
    generation: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    nodes: int


@dataclass(frozen=True, slots=True)
class AutoscaleRequested:
    """How the job's size is chosen from now on."""

    change: AutoscaleChange


@dataclass(frozen=True, slots=True)
class SizeReviewed:
    """The job's size is looked at: every review_interval_s. wall_s: deadlines are given in wall-clock time."""

    wall_s: float
    # Nodes that the jobs which share them leave to this one.
    share: int = 2**31


@dataclass(frozen=True, slots=True)
class PauseRequested:
    pass


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    pass


@dataclass(frozen=True, slots=True)
class DrainRequested:
    node_id: str


@dataclass(frozen=True, slots=True)
class CheckpointRequested:
    """The workers are to write a checkpoint at the next step boundary, and to go on."""


@dataclass(frozen=True, slots=True)
class DeleteRequested:
    """All nodes are dismissed; the runner then forgets the job."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The controller has started again and read the job's record from the store."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. The runner sends one when `next_wake_s` says so, and at least every tick_interval_s."""


Event = (
    JobCreated
    | NodeHello
    | NodeHeartbeat
    | NodeReady
    | NodeSucceeded
    | NodeLeft
    | StreamClosed
    | WorkerHello
    | WorkerStreamClosed
    | WorkerAlive
    | WorkerAsked
    | WorkerProgressed
    | WorkerLeft
    | WorkerFinished
    | WorkerDraining
    | CheckpointCommitted
    | CheckpointFailed
    | ScaleRequested
    | AutoscaleRequested
    | SizeReviewed
    | PauseRequested
    | ResumeRequested
    | DrainRequested
    | CheckpointRequested
    | DeleteRequested
    | Recovered
    | Tick
)
