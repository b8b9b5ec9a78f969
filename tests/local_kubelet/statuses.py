"""A pod's status, as a kubelet writes it, from what its containers do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from local_kubelet.cluster import Json


@dataclass(frozen=True, slots=True)
class ContainerState:
    """What one container does. Exactly one of waiting, running and terminated is said, by what is not empty.

    waiting: a reason such as ImagePullBackOff; started_at alone: running; exit_code: terminated, for a reason.
    """

    name: str
    image: str
    waiting: str = ""
    message: str = ""
    started_at: str = ""
    exit_code: int | None = None
    reason: str = ""
    finished_at: str = ""
    ready: bool = False
    restarts: int = 0

    def told(self) -> Json:
        return {
            "name": self.name,
            "image": self.image,
            "imageID": self.image,
            "ready": self.ready,
            "started": bool(self.started_at) and self.exit_code is None,
            "restartCount": self.restarts,
            "state": self._state(),
        }

    def _state(self) -> Json:
        if self.exit_code is not None:
            ended = {"exitCode": self.exit_code, "reason": self.reason, "message": self.message}
            return {"terminated": {**ended, "startedAt": self.started_at, "finishedAt": self.finished_at}}
        if self.started_at:
            return {"running": {"startedAt": self.started_at}}
        return {"waiting": {"reason": self.waiting, "message": self.message}}


def phase(containers: Sequence[ContainerState], *, restarts: bool) -> str:
    """Of a pod with these containers. restarts: whether an ended container is started again."""
    if all(each.exit_code is not None for each in containers) and not restarts:
        return "Succeeded" if all(each.exit_code == 0 for each in containers) else "Failed"
    if any(each.started_at or each.restarts for each in containers):
        return "Running"
    return "Pending"


def status(
    containers: Sequence[ContainerState], *, node_ip: str, pod_ip: str, started_at: str, now: str, restarts: bool
) -> Json:
    """The whole status of a pod that is bound."""
    ready = all(each.ready for each in containers)
    unready = [each.name for each in containers if not each.ready]
    why = {} if ready else {"reason": "ContainersNotReady", "message": f"containers with unready status: {unready}"}
    return {
        "phase": phase(containers, restarts=restarts),
        "hostIP": node_ip,
        "podIP": pod_ip,
        "podIPs": [{"ip": pod_ip}],
        "startTime": started_at,
        "containerStatuses": [each.told() for each in containers],
        "conditions": [
            condition("Initialized", True, now),
            {**condition("Ready", ready, now), **why},
            {**condition("ContainersReady", ready, now), **why},
        ],
    }


def condition(kind: str, holds: bool, now: str, reason: str = "", message: str = "") -> Json:
    """An entry of status.conditions; a strategic merge keeps the others."""
    said: Json = {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": now}
    # Null takes away what an earlier one said.
    return {**said, "reason": reason or None, "message": message or None}
