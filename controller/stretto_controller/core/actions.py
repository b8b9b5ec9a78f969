"""What a decision asks the runner to do, in this order, after the record is saved. Every action may be repeated."""

from __future__ import annotations

from dataclasses import dataclass

from stretto_controller.core.model import Cause, Generation, JobState


@dataclass(frozen=True, slots=True)
class Assign:
    """Answer a node's Ready: it is a member of `generation`."""

    node_id: str
    request_id: int
    generation: Generation
    at_fault: bool = False


@dataclass(frozen=True, slots=True)
class StartWorkers:
    """Answer a node's Ready in in-process mode: start the workers; they ask for their places themselves."""

    node_id: str
    request_id: int
    at_fault: bool = False


@dataclass(frozen=True, slots=True)
class StopWorkers:
    """force: with SIGKILL, since they no longer answer."""

    node_id: str
    generation: int
    reason: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class AssignWorker:
    """Answer a live worker's request: its rank in `generation` (in-process mode)."""

    session_id: str
    request_id: int
    generation: Generation
    rank: int


@dataclass(frozen=True, slots=True)
class CutGeneration:
    """The generation is broken: drop what is in flight, answer at once, and ask for the next one."""

    session_id: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class SaveAndExit:
    """The job gives up: write a checkpoint if the state is whole, then exit."""

    session_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dismiss:
    """End this node's agent: with exit code 0 if `success`."""

    node_id: str
    success: bool
    reason: str


@dataclass(frozen=True, slots=True)
class FinishGeneration:
    """Every member's workers ended well: release this node's agent."""

    node_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class WelcomeWorker:
    session_id: str
    scale: float


@dataclass(frozen=True, slots=True)
class AskToLeave:
    """Ask the worker on this stream to leave after an agreed step. save: and to write a checkpoint of it."""

    session_id: str
    generation: int
    reason: str
    save: bool


@dataclass(frozen=True, slots=True)
class AskToSave:
    """Ask the worker on this stream to have a checkpoint written at the next step boundary, and to go on."""

    session_id: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class FenceWorker:
    session_id: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class CloseSession:
    """A newer stream of the same node has replaced this one."""

    session_id: str


@dataclass(frozen=True, slots=True)
class LogEvent:
    """A line of the job's story, kept and shown. kind: a short, stable word such as `node_joined`."""

    kind: str
    reason: str
    node_id: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class BeginGeneration:
    """A new generation was assigned: for history and metrics."""

    generation: Generation
    cause: Cause


@dataclass(frozen=True, slots=True)
class FirstStep:
    """A generation has committed its first step.

    pause_s: since the workers of the last one began to stop. steps_before, tau_before: where it began, as its workers
    say; what earlier generations did beyond that does not count any more.
    """

    generation: int
    cause: Cause
    pause_s: float
    steps_before: int
    tau_before: float


@dataclass(frozen=True, slots=True)
class ReachTarget:
    """For history: the job is done, in that generation and after so many steps."""

    generation: int
    steps: int
    tau: float


@dataclass(frozen=True, slots=True)
class EndGeneration:
    """For history: the generation's last figures, as far as the controller was told; steps 0: it was told none.

    steps_before, first_tau: as in FirstStep, which a controller that was away may have missed.
    """

    generation: Generation
    steps_before: int
    steps: int
    first_tau: float
    mean_gain: float
    effective_lr: float
    last_tau: float
    pause_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the job from the store."""


Action = (
    Assign
    | StartWorkers
    | StopWorkers
    | AssignWorker
    | CutGeneration
    | SaveAndExit
    | Dismiss
    | FinishGeneration
    | WelcomeWorker
    | AskToLeave
    | AskToSave
    | FenceWorker
    | CloseSession
    | LogEvent
    | BeginGeneration
    | FirstStep
    | ReachTarget
    | EndGeneration
    | Forget
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The new state, what to do, and why, in words."""

    state: JobState
    actions: tuple[Action, ...] = ()
    reason: str = ""
    # Nothing follows from the event yet, and the next wake-up comes no earlier for it.
    quiet: bool = False
