"""Suspend: training stops at a step boundary and saves, then the pods go. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stretto_operator.job import Job
from stretto_operator.limits import Limits
from stretto_operator.pod import Pod
from stretto_operator.view import ControllerView


@dataclass(frozen=True, slots=True)
class Suspension:
    """release: the pods may go. since_s: when the wish was first seen; None: it is not, or no longer, suspended."""

    release: bool
    since_s: float | None
    reason: str
    message: str
    look_again_s: float | None = None


def suspension(job: Job, view: ControllerView, pods: Sequence[Pod], *, now_s: float, limits: Limits) -> Suspension:
    """Where the job stands between training and being suspended."""
    if not job.suspend:
        waits = job.record.suspend_s is not None and view.reachable and view.job is not None
        if waits and view.job is not None and view.job.phase == "paused":
            return Suspension(False, job.record.suspend_s, "Resuming", "the controller is asked to go on")
        return Suspension(False, None, "Resumed", "")
    since_s = job.record.suspend_s if job.record.suspend_s is not None else now_s
    if not pods:
        return Suspension(True, since_s, "Suspended", "no pods are left")
    until_s = since_s + limits.suspend_limit_s
    trains = view.job is not None and not view.job.finished and view.job.phase != "paused" and view.job.generation > 0
    if any(pod.alive for pod in pods) and (trains or not view.reachable) and now_s < until_s:
        what = "training stops at the next step boundary, and saves" if trains else "the controller cannot be reached"
        return Suspension(False, since_s, "Suspending", what, until_s)
    return Suspension(True, since_s, "Suspending", "its pods end")
