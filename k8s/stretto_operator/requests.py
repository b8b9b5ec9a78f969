"""What the controller is asked to do about a job; each may be asked again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stretto_operator.job import Autoscale, Job, Training
from stretto_operator.outcome import Judgement, agrees, is_current
from stretto_operator.pod import Pod, PodState
from stretto_operator.view import ControllerView


@dataclass(frozen=True, slots=True)
class Create:
    job: str
    training: Training
    desired_nodes: int


@dataclass(frozen=True, slots=True)
class Scale:
    job: str
    nodes: int


@dataclass(frozen=True, slots=True)
class SetAutoscale:
    job: str
    autoscale: Autoscale


@dataclass(frozen=True, slots=True)
class Pause:
    job: str


@dataclass(frozen=True, slots=True)
class Resume:
    job: str


@dataclass(frozen=True, slots=True)
class Delete:
    job: str


Request = Create | Scale | SetAutoscale | Pause | Resume | Delete


def requests(
    job: Job, view: ControllerView, pods: Sequence[Pod], judgement: Judgement, target: int
) -> tuple[Request, ...]:
    """What to ask of the controller while the job goes on. Nothing while it cannot be reached."""
    if not view.reachable:
        return ()
    name, known = job.controller_job, view.job
    if job.suspend:
        return (Pause(name),) if known is not None and _trains(view, judgement) else ()
    over = known is None or not is_current(known, judgement.former_generation)
    if over or (known is not None and not judgement.registered and not agrees(known, job)):
        return (Create(name, job.training, target),) if job.training.mode else ()
    assert known is not None
    asked: list[Request] = []
    if job.record.suspend_s is not None and known.phase == "paused":
        asked.append(Resume(name))
    if not known.finished and not agrees_on_size(known.autoscale, job.autoscale):
        asked.append(SetAutoscale(name, job.autoscale))
    elif known.autoscale.mode == "act":
        # The controller chooses; a number of ours would take that over.
        return tuple(asked)
    if not known.finished and _may_scale(known.desired_nodes or known.training.max_nodes, target, pods):
        asked.append(Scale(name, target))
    return tuple(asked)


def agrees_on_size(theirs: Autoscale, mine: Autoscale) -> bool:
    """The controller chooses the job's size as this object says, as far as it says anything."""
    return all(
        getattr(mine, name) in (0, "", getattr(theirs, name))
        for name in ("mode", "goal", "efficiency_floor", "deadline_s")
    )


def target(job: Job, view: ControllerView, pods: Sequence[Pod]) -> int:
    """How many pods are wanted: what the object says, or, where the controller may act, what that wants."""
    if job.autoscale.mode != "act":
        return job.nodes
    known = view.job
    if known is None or known.finished or known.autoscale.mode != "act":
        # Until the controller has said a number, nobody goes.
        return max(job.nodes, min(len(pods), job.training.max_nodes))
    least, most = job.training.min_nodes, job.training.max_nodes
    return min(max(known.desired_nodes or job.nodes, least), most)


def _trains(view: ControllerView, judgement: Judgement) -> bool:
    known = view.job
    return (
        known is not None
        and known.phase != "paused"
        and not known.finished
        and is_current(known, judgement.former_generation)
    )


def _may_scale(desired: int, target: int, pods: Sequence[Pod]) -> bool:
    """Growth is told at once. Shrinking begins with the pods that go, which drain; then this is only put on record.

    Told first, the controller would choose others than the pods that go, and there would be two changes for one.
    """
    if target >= desired:
        return target > desired
    left = sum(pod.state in (PodState.PENDING, PodState.RUNNING, PodState.TERMINATING) for pod in pods)
    return left <= target
