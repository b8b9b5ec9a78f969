"""What became of one pod, and whose fault it was. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stretto_operator import names
from stretto_operator.times import from_text

_MESSAGE_LENGTH = 200
# The cluster took the pod away, whatever its processes said to that.
_TAKEN = frozenset({"Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated", "NodeAffinity", "Shutdown"})
# A container that waits for one of these waits because something is wrong.
_STUCK = frozenset(
    {
        "ImagePullBackOff",
        "ErrImagePull",
        "ErrImageNeverPull",
        "InvalidImageName",
        "ImageInspectError",
        "RegistryUnavailable",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CrashLoopBackOff",
    }
)


class PodState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TERMINATING = "terminating"


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of a job. reason, message: why it failed, or why it does not run."""

    name: str
    uid: str
    index: int
    state: PodState
    ready: bool = False
    reason: str = ""
    message: str = ""
    # Of the container that failed; 0 where none did.
    exit_code: int = 0
    # It failed, and the cluster had no hand in it.
    own_fault: bool = False
    # When its containers ended, and for how long the longest of them had run.
    ended_s: float = 0.0
    ran_s: float = 0.0
    # TERMINATING: when its grace period ends.
    gone_by_s: float = 0.0

    @property
    def failure(self) -> str:
        """Why it failed, in a few words."""
        return f"exit code {self.exit_code} ({self.reason})" if self.exit_code else self.reason

    @property
    def alive(self) -> bool:
        return self.state in (PodState.PENDING, PodState.RUNNING)


def read_pods(manifests: Iterable[Mapping[str, Any]], job_uid: str) -> tuple[Pod, ...]:
    """Those that belong to the job by their owner references, by index; a label alone proves nothing."""
    pods = [read_pod(manifest) for manifest in manifests if is_owned(manifest, job_uid)]
    return tuple(sorted((pod for pod in pods if pod is not None), key=lambda pod: pod.index))


def is_owned(manifest: Mapping[str, Any], owner_uid: str) -> bool:
    """The object says that it was made for the object with this uid."""
    owners = manifest["metadata"].get("ownerReferences") or ()
    return bool(owner_uid) and any(owner.get("uid") == owner_uid and owner.get("controller") for owner in owners)


def read_pod(manifest: Mapping[str, Any]) -> Pod | None:
    """None: it has no index, so it is none of ours."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    index = (metadata.get("labels") or {}).get(names.INDEX_LABEL, "")
    if not index.isdecimal():
        return None
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    state = _state(metadata, status)
    reason, message = _why(state, status, conditions)
    ends = _ends(status)
    return Pod(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        index=int(index),
        state=state,
        ready=state is PodState.RUNNING and conditions.get("Ready", {}).get("status") == "True",
        reason=reason,
        message=message[:_MESSAGE_LENGTH],
        exit_code=_exit_code(status) if state is PodState.FAILED else 0,
        own_fault=state is PodState.FAILED and not _was_taken(status, conditions),
        ended_s=max((end for _, end in ends), default=0.0),
        ran_s=max((end - start for start, end in ends), default=0.0),
        gone_by_s=from_text(metadata.get("deletionTimestamp")) or 0.0,
    )


def _state(metadata: Mapping[str, Any], status: Mapping[str, Any]) -> PodState:
    if metadata.get("deletionTimestamp"):
        return PodState.TERMINATING
    match status.get("phase"):
        case "Running":
            return PodState.RUNNING
        case "Succeeded":
            return PodState.SUCCEEDED
        case "Failed":
            return PodState.FAILED
        case _:
            return PodState.PENDING


def _why(state: PodState, status: Mapping[str, Any], conditions: Mapping[str, Any]) -> tuple[str, str]:
    """A reason in one word, and in words."""
    if state is PodState.FAILED:
        if _was_taken(status, conditions):
            taken = conditions.get("DisruptionTarget", {})
            return (
                status.get("reason") or taken.get("reason") or "Disrupted",
                status.get("message") or taken.get("message", ""),
            )
        return _worst_end(status)
    if state is PodState.PENDING:
        for container in _containers(status):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                return waiting["reason"], waiting.get("message", "")
        scheduled = conditions.get("PodScheduled", {})
        if scheduled.get("status") == "False":
            return scheduled.get("reason") or "Unschedulable", scheduled.get("message", "")
    return "", ""


def _worst_end(status: Mapping[str, Any]) -> tuple[str, str]:
    for container in _containers(status):
        ended = (container.get("state") or {}).get("terminated") or {}
        if ended.get("exitCode", 0) != 0:
            code = f"container {container.get('name')} ended with exit code {ended['exitCode']}"
            return ended.get("reason") or "Error", ": ".join(filter(None, (code, ended.get("message", "").strip())))
    return status.get("reason") or "Error", status.get("message", "")


def _exit_code(status: Mapping[str, Any]) -> int:
    codes = ((each.get("state") or {}).get("terminated", {}).get("exitCode", 0) for each in _containers(status))
    return next((code for code in codes if code), 0)


def _was_taken(status: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    return status.get("reason") in _TAKEN or conditions.get("DisruptionTarget", {}).get("status") == "True"


def _ends(status: Mapping[str, Any]) -> list[tuple[float, float]]:
    """When each ended container had begun, and when it ended."""
    found = []
    for container in _containers(status):
        ended = (container.get("state") or {}).get("terminated") or {}
        end = from_text(ended.get("finishedAt"))
        if end is not None:
            found.append((from_text(ended.get("startedAt")) or end, end))
    return found


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
