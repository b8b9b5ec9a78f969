"""`actions`: the API calls that lead from what was found to what is wanted, safe to cut off anywhere. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stretto_operator.desired import Wanted
from stretto_operator.job import Job
from stretto_operator.status import FIGURES, announcements

Manifest = Mapping[str, Any]
# A record that must be written before anything is done that it would be needed to understand.
_RECORDED = ("failures", "formerGeneration", "registered", "suspendTime", "completionTime", "credentials")


@dataclass(frozen=True, slots=True)
class Create:
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Restore:
    """Bring back what is ours of an object, by a JSON patch that the server refuses if it belongs to another job."""

    manifest: Manifest
    patch: tuple[Manifest, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """Create the Secret, or bring it back: it is not looked at, so that the operator may not read any Secret."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the object with this uid and no other. force: without waiting for its node."""

    kind: str
    namespace: str
    name: str
    uid: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Its time to live is over."""


@dataclass(frozen=True, slots=True)
class WriteStatus:
    status: Manifest


@dataclass(frozen=True, slots=True)
class Announce:
    """An event. type: Normal or Warning."""

    type: str
    reason: str
    message: str


Action = Create | Restore | Keep | Delete | DeleteJob | WriteStatus | Announce


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a status is written. written_s: when this job's was last written, by this process.

    figures_s: for those that move with every step; status_s: for the rest, but a new phase is written at once.
    """

    written_s: float = 0.0
    figures_s: float = 10.0
    status_s: float = 2.0


def actions(
    wanted: Wanted, job: Job, found: Sequence[Manifest], *, now_s: float, pace: Pace
) -> tuple[tuple[Action, ...], float | None]:
    """The calls in order, and when to look again because a status waits for its time. found: the job's own objects."""
    if job.deleting:
        return (), None
    if wanted.expired:
        return (DeleteJob(),), None
    exists = {(each["kind"], each["metadata"]["name"]): each for each in found}
    first: list[Action] = []
    changes: list[Action] = []
    for doomed in wanted.doomed:
        if doomed.reason == "NodeLost" or (doomed.reason == "Replaced" and not doomed.pod.own_fault):
            changes.append(Announce("Warning", "PodReplaced", doomed.message))
        changes.append(Delete("Pod", job.namespace, doomed.pod.name, doomed.pod.uid, doomed.force))
    for manifest in wanted.objects:
        there = exists.get((manifest["kind"], manifest["metadata"]["name"]))
        if manifest["kind"] == "Secret":
            if wanted.credentials_lost or wanted.status.get("credentials") != job.record.manifest.get("credentials"):
                first.append(Keep(manifest))
        elif there is None:
            changes.append(Create(manifest))
        elif manifest["kind"] != "Pod" and not _covers(there.get("spec"), manifest["spec"]):
            changes.append(Restore(manifest, restoring(manifest, "spec")))
    kept = {(each["kind"], each["metadata"]["name"]) for each in wanted.objects}
    for key, there in exists.items():
        if there["kind"] != "Pod" and key not in kept:
            metadata = there["metadata"]
            changes.append(Delete(there["kind"], job.namespace, metadata["name"], metadata["uid"]))
    due_s = _due_s(job.record.manifest, wanted.status, pace)
    if due_s is None or due_s > now_s:
        return (*first, *changes), due_s
    announced = [Announce(*each) for each in announcements(job.name, job.record.manifest, wanted.status)]
    return (*first, WriteStatus(wanted.status), *announced, *changes), None


def restoring(manifest: Manifest, part: str) -> tuple[Manifest, ...]:
    """A JSON patch of one part of an object, if its first owner is still the same."""
    owner = manifest["metadata"]["ownerReferences"][0]["uid"]
    return (
        {"op": "test", "path": "/metadata/ownerReferences/0/uid", "value": owner},
        {"op": "replace", "path": f"/{part}", "value": manifest[part]},
    )


def _due_s(before: Manifest, after: Manifest, pace: Pace) -> float | None:
    """When the status is to be written; None: it is as it should be."""
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    if not changed:
        return None
    if changed <= set(FIGURES):
        return pace.written_s + pace.figures_s
    if changed & {"phase", *_RECORDED}:
        return 0.0
    return pace.written_s + pace.status_s


def _covers(there: Any, wanted: Any) -> bool:
    """Everything wanted is there; what the API server or others added does not matter."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(_covers(there.get(key), value) for key, value in wanted.items())
    return bool(there == wanted)
