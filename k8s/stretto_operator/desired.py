"""`wanted`: what should be there, given the spec, the controller's view, the pods and the time. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from stretto_operator import names, status
from stretto_operator.belongings import disruption_budget_manifest, secret_manifest
from stretto_operator.job import Job
from stretto_operator.limits import Limits
from stretto_operator.outcome import Judgement, judge
from stretto_operator.placement import Doomed, Placement, overdue, place
from stretto_operator.pod import Pod, PodState
from stretto_operator.pod_template import pod_manifest
from stretto_operator.requests import Request, requests, target
from stretto_operator.surroundings import Surroundings
from stretto_operator.suspension import Suspension, suspension
from stretto_operator.view import ControllerView

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """objects: what should exist. doomed: pods that should not. requests: to the controller.

    expired: the job itself is to be deleted. look_again_s: when time alone will change any of this.
    """

    objects: tuple[Manifest, ...] = ()
    doomed: tuple[Doomed, ...] = ()
    requests: tuple[Request, ...] = ()
    status: Manifest = field(default_factory=lambda: MappingProxyType({}))
    expired: bool = False
    # A pod says that the Secret is not there.
    credentials_lost: bool = False
    look_again_s: float | None = None


def wanted(
    job: Job,
    view: ControllerView,
    pods: Sequence[Pod],
    around: Surroundings,
    *,
    now_s: float,
    limits: Limits,
    objection: str = "",
) -> Wanted:
    """Everything that follows from what is known now; nothing else is remembered.

    objection: what the API server said when it refused an object of this job, the last time.
    """
    if job.deleting:
        return Wanted()
    if job.record.finished:
        return _finished(job, pods, now_s, limits)
    nodes = target(job, view, pods)
    judgement = judge(job, view, pods, now_s=now_s, limits=limits)
    if judgement.outcome:
        told = status.Situation(view, tuple(pods), judgement, None, nodes)
        return Wanted(status=status.status(job, told, now_s=now_s))
    stage = suspension(job, view, pods, now_s=now_s, limits=limits)
    placement = _place(job, nodes, view, pods, judgement, stage, now_s, limits)
    late = overdue(pods, now_s, limits)
    told = status.Situation(view, tuple(pods), judgement, stage, nodes, objection)
    objects = _objects(job, placement, around)
    # A moment later than its own clock lets it be asked.
    refused_s = now_s + limits.refused_s + 0.1 if view.refusal else None
    secret = names.secret(job.name)
    return Wanted(
        objects=objects,
        doomed=(*placement.doomed, *late.doomed),
        requests=requests(job, view, pods, judgement, nodes),
        status={**status.status(job, told, now_s=now_s), **_fingerprint(objects)},
        credentials_lost=any(pod.reason == "CreateContainerConfigError" and secret in pod.message for pod in pods),
        look_again_s=_earliest(placement.look_again_s, late.look_again_s, stage.look_again_s, refused_s),
    )


def _place(
    job: Job,
    nodes: int,
    view: ControllerView,
    pods: Sequence[Pod],
    judgement: Judgement,
    stage: Suspension,
    now_s: float,
    limits: Limits,
) -> Placement:
    present = tuple(pod.index for pod in pods)
    if job.suspend:
        gone = tuple(
            Doomed(pod, "Suspended", stage.message)
            for pod in pods
            if stage.release and pod.state is not PodState.TERMINATING
        )
        return Placement((), gone)
    if view.reachable and not judgement.registered:
        # First the controller learns of the job, or refuses it; pods that are there already stay.
        return Placement(present)
    return place(job, nodes, pods, judgement, view.job, now_s, limits)


def _objects(job: Job, placement: Placement, around: Surroundings) -> tuple[Manifest, ...]:
    beside = (secret_manifest(job, around), disruption_budget_manifest(job))
    pods = (pod_manifest(job, index, around) for index in placement.indexes)
    return (*(each for each in beside if each is not None), *pods)


def _fingerprint(objects: Sequence[Manifest]) -> dict[str, str]:
    """Tells whether the Secret that was made last holds what it should."""
    for each in objects:
        if each["kind"] == "Secret":
            digest = hashlib.sha256(json.dumps(each["data"], sort_keys=True).encode())
            return {"credentials": digest.hexdigest()[:16]}
    return {}


def _finished(job: Job, pods: Sequence[Pod], now_s: float, limits: Limits) -> Wanted:
    """What has ended stays, for its logs; what still runs, goes; in the end the job itself."""
    record = job.record
    ended_s = record.completion_s if record.completion_s is not None else now_s
    running_until_s = ended_s + (limits.finish_limit_s if record.holds("Succeeded") else 0.0)
    running = [pod for pod in pods if pod.alive]
    late = overdue(pods, now_s, limits)
    doomed = [Doomed(pod, "Finished", "the job is over") for pod in running if now_s >= running_until_s]
    expires_s = None if job.ttl_s is None else ended_s + job.ttl_s
    return Wanted(
        doomed=(*doomed, *late.doomed),
        status={
            **record.manifest,
            "nodes": sum(pod.alive for pod in pods),
            "readyNodes": sum(pod.ready for pod in pods),
        },
        expired=expires_s is not None and now_s >= expires_s,
        look_again_s=_earliest(running_until_s if running else None, late.look_again_s, expires_s, after_s=now_s),
    )


def _earliest(*times_s: float | None, after_s: float = 0.0) -> float | None:
    return min((time_s for time_s in times_s if time_s is not None and time_s > after_s), default=None)
