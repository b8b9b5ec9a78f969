"""Whose fault a failure was, and whether the job is over: what the controller and the pods' exits say, in one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stretto_operator import names
from stretto_operator.job import Job
from stretto_operator.limits import Limits
from stretto_operator.pod import Pod, PodState
from stretto_operator.record import NO_FORMER_RUN, Failure
from stretto_operator.view import ControllerView, JobView


@dataclass(frozen=True, slots=True)
class Judgement:
    """outcome: Succeeded, Failed, or nothing while the job goes on. The rest is what the record should say."""

    registered: bool
    former_generation: int
    failures: Mapping[int, Failure]
    outcome: str = ""
    reason: str = ""
    message: str = ""

    def given_up(self, index: int, job: Job) -> bool:
        """The pod of this index has failed too often to be replaced."""
        return index in self.failures and self.failures[index].count > job.backoff_limit


def judge(job: Job, view: ControllerView, pods: Sequence[Pod], *, now_s: float, limits: Limits) -> Judgement:
    """What has come of the job so far; idempotent: judged again after it was recorded, it is the same."""
    registered, former = _registration(job, view, pods)
    failures = dict(job.record.failures)
    for pod in pods:
        if pod.own_fault:
            _count(failures, pod, pod.ended_s or now_s, pod.failure, limits)
    current = view.job if view.job is not None and is_current(view.job, former) else None
    if current is not None and current.phase == "failed":
        # The attempt is over for all of them, also for those that have not ended yet.
        for pod in pods:
            if pod.alive or pod.state is PodState.SUCCEEDED:
                _count(failures, pod, now_s, "JobFailed", limits)
        former = current.generation
    judgement = Judgement(registered, former, failures)
    if current is not None and current.phase == "succeeded":
        return replace(judgement, outcome="Succeeded", reason="Finished", message=current.reason)
    if view.reachable and _all_succeeded(job, pods, view):
        message = f"all {job.nodes} pods ended well" if job.nodes > 1 else "its pod ended well"
        return replace(judgement, outcome="Succeeded", reason="PodsSucceeded", message=message)
    given_up = sum(judgement.given_up(index, job) for index in failures if _has_place(index, job, pods))
    if given_up and job.nodes - given_up < job.training.min_nodes:
        return replace(judgement, outcome="Failed", reason="BackoffLimitExceeded", message=_why(job, failures, current))
    return judgement


def is_current(view: JobView, former_generation: int) -> bool:
    """It is this object's run, and not an earlier one, or an attempt that has been counted, under its name."""
    return not (view.finished and former_generation != NO_FORMER_RUN and view.generation == former_generation)


def _registration(job: Job, view: ControllerView, pods: Sequence[Pod]) -> tuple[bool, int]:
    """Whether the controller knows this object's job, and the generation at which an earlier run had ended."""
    record = job.record
    if record.registered or not view.reachable or view.refusal:
        return record.registered, record.former_generation
    if view.job is None or view.job.finished:
        # One with a mode is created first; one without is created by its first agent.
        former = view.job.generation if view.job is not None and not pods else NO_FORMER_RUN
        return not job.training.mode, former
    return agrees(view.job, job), NO_FORMER_RUN


def agrees(view: JobView, job: Job) -> bool:
    """The controller's job is what this object says, as far as it says anything."""
    mine, theirs = job.training, view.training
    return all(
        getattr(mine, name) in (0, "", getattr(theirs, name))
        for name in (
            "min_nodes",
            "max_nodes",
            "mode",
            "base_batch_size",
            "batch_size",
            "global_batch_size",
            "target_tau",
        )
    )


def _count(failures: dict[int, Failure], pod: Pod, time_s: float, reason: str, limits: Limits) -> None:
    """Each pod counts once, whatever was forgotten in between: its uid is recorded."""
    before = failures.get(pod.index)
    if before is not None and before.uid == pod.uid:
        return
    count = 1 if before is None or pod.ran_s >= limits.healthy_run_s else before.count + 1
    failures[pod.index] = Failure(pod.index, count, pod.uid, time_s, reason)


def _all_succeeded(job: Job, pods: Sequence[Pod], view: ControllerView) -> bool:
    """The pods' exits decide only where no generation ever began: scripts that do not speak to the controller."""
    trained = view.job is not None and not view.job.finished and view.job.generation > 0
    ended = [pod for pod in pods if pod.state is PodState.SUCCEEDED]
    return not trained and len(ended) >= job.nodes and len(ended) == len(pods)


def _has_place(index: int, job: Job, pods: Sequence[Pod]) -> bool:
    return index < job.nodes or any(pod.index == index for pod in pods)


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _why(job: Job, failures: Mapping[int, Failure], view: JobView | None) -> str:
    latest = max(failures.values(), key=lambda failure: failure.time_s)
    told = f"; the controller says: {view.reason}" if view is not None and view.reason else ""
    pod = names.pod(job.name, latest.index)
    return f"pod {pod} failed {times(latest.count)}, last with {latest.reason}{told}"
