"""Which indexes have a pod, which pods go, and when. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stretto_operator.job import Job
from stretto_operator.limits import Limits
from stretto_operator.outcome import Judgement
from stretto_operator.pod import Pod, PodState
from stretto_operator.view import JobView

_NOBODY = JobView("")


@dataclass(frozen=True, slots=True)
class Doomed:
    """A pod that goes, and why. force: its node is lost, and nobody will say that it has gone."""

    pod: Pod
    reason: str
    message: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """indexes: those that have a pod now, or get one. look_again_s: when time alone changes this."""

    indexes: tuple[int, ...] = ()
    doomed: tuple[Doomed, ...] = ()
    look_again_s: float | None = None


def place(
    job: Job, target: int, pods: Sequence[Pod], judgement: Judgement, view: JobView | None, now_s: float, limits: Limits
) -> Placement:
    """`target` indexes, the lowest that are free; pods that wait or fail hold up no others."""
    by_index = {pod.index: pod for pod in pods}
    occupied = [*by_index, *(index for index in judgement.failures if index not in by_index and index < target)]
    keep = sorted(occupied, key=lambda index: _worth(by_index.get(index), index, judgement, job, view))[-target:]
    free = (index for index in range(job.training.max_nodes + len(keep)) if index not in keep)
    seats = [*keep, *(next(free) for _ in range(target - len(keep)))]
    present, doomed, times = [], [], []
    for index in sorted(seats):
        pod = by_index.get(index)
        due_s = 0.0 if pod is None else _due_s(pod, judgement, view, limits)
        if pod is None and not judgement.given_up(index, job):
            present.append(index)
        elif pod is None or judgement.given_up(index, job):
            # The last one stays for those who look for the reason.
            continue
        elif due_s is None:
            present.append(index)
        elif due_s <= now_s:
            doomed.append(Doomed(pod, "Replaced", _why(pod)))
        else:
            times.append(due_s)
    surplus = [pod for pod in pods if pod.index not in seats and pod.state is not PodState.TERMINATING]
    doomed += [Doomed(pod, "ScaledDown", f"{target} nodes wanted") for pod in surplus]
    return Placement(tuple(present), tuple(doomed), min(times, default=None))


def overdue(pods: Sequence[Pod], now_s: float, limits: Limits) -> Placement:
    """Pods that should have gone long ago."""
    going = [(pod, pod.gone_by_s + limits.terminating_limit_s) for pod in pods if pod.state is PodState.TERMINATING]
    doomed = tuple(
        Doomed(pod, "NodeLost", f"{pod.name} is still there after its grace period", force=True)
        for pod, due_s in going
        if due_s <= now_s
    )
    return Placement((), doomed, min((due_s for _, due_s in going if due_s > now_s), default=None))


def _worth(
    pod: Pod | None, index: int, judgement: Judgement, job: Job, view: JobView | None
) -> tuple[bool, bool, bool, bool, bool, int]:
    """Who stays when fewer are wanted: those that train, rank 0 before others, and then the lowest indexes."""
    node = (view or _NOBODY).nodes.get(pod.name) if pod is not None else None
    return (
        not judgement.given_up(index, job),
        pod is not None and pod.alive,
        pod is not None and pod.state is PodState.RUNNING,
        node is not None and node.rank >= 0,
        node is not None and node.rank == 0,
        -index,
    )


def _due_s(pod: Pod, judgement: Judgement, view: JobView | None, limits: Limits) -> float | None:
    """When the pod is to be deleted so that its index gets another; None: not at all."""
    failure = judgement.failures.get(pod.index)
    match pod.state:
        case PodState.FAILED if failure is not None and failure.uid == pod.uid:
            return failure.time_s + min(limits.backoff_s * 2.0 ** (failure.count - 1), limits.backoff_limit_s)
        case PodState.FAILED:
            return pod.ended_s + limits.disrupted_s
        case _ if failure is not None and failure.uid == pod.uid and pod.state is not PodState.TERMINATING:
            # It belongs to an attempt that has failed as a whole.
            return failure.time_s
        case PodState.SUCCEEDED if view is not None and not view.finished and view.generation > 0:
            return pod.ended_s + limits.completed_limit_s
        case _:
            return None


def _why(pod: Pod) -> str:
    what = f"{pod.name} {'failed' if pod.state is PodState.FAILED else 'has ended'}"
    return ": ".join(filter(None, (what, pod.reason, pod.message)))
