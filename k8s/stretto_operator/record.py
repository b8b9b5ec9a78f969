"""What this operator has written into a job's status for itself: it survives the operator's death. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from stretto_operator.times import from_text, to_text

# No finished run of an earlier object of this name was found.
NO_FORMER_RUN = -1


@dataclass(frozen=True, slots=True)
class Failure:
    """How often the pod of one index failed by its own fault, and which one did last."""

    index: int
    count: int
    uid: str
    time_s: float
    reason: str

    def manifest(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "count": self.count,
            "uid": self.uid,
            "time": to_text(self.time_s),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Condition:
    """As the API has it. changed_s: when `status` was last another."""

    type: str
    status: bool
    reason: str
    message: str
    changed_s: float

    def manifest(self, revision: int) -> dict[str, Any]:
        return {
            "type": self.type,
            "status": str(self.status),
            "reason": self.reason,
            "message": self.message,
            "lastTransitionTime": to_text(self.changed_s),
            "observedGeneration": revision,
        }


@dataclass(frozen=True, slots=True)
class Record:
    """The status as it was last written."""

    phase: str = ""
    conditions: Mapping[str, Condition] = field(default_factory=lambda: MappingProxyType({}))
    failures: Mapping[int, Failure] = field(default_factory=lambda: MappingProxyType({}))
    # The controller was told of this object's job, or knew it.
    registered: bool = False
    # The controller's generation at which an earlier run under this name, or a failed attempt of this one, ended.
    former_generation: int = NO_FORMER_RUN
    # Since when it is to be suspended; None: it is not, or has gone on.
    suspend_s: float | None = None
    start_s: float | None = None
    completion_s: float | None = None
    # The object as it is; what is written is compared with it.
    manifest: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def holds(self, condition: str) -> bool:
        return condition in self.conditions and self.conditions[condition].status

    @property
    def finished(self) -> bool:
        return self.holds("Succeeded") or self.holds("Failed")


def read_record(status: Mapping[str, Any]) -> Record:
    conditions = {
        each["type"]: Condition(
            each["type"],
            each.get("status") == "True",
            each.get("reason", ""),
            each.get("message", ""),
            from_text(each.get("lastTransitionTime")) or 0.0,
        )
        for each in status.get("conditions") or ()
    }
    failures = {
        each["index"]: Failure(
            each["index"], each["count"], each["uid"], from_text(each.get("time")) or 0.0, each.get("reason", "")
        )
        for each in status.get("failures") or ()
    }
    return Record(
        phase=status.get("phase", ""),
        conditions=conditions,
        failures=failures,
        registered=bool(status.get("registered", False)),
        former_generation=int(status.get("formerGeneration", NO_FORMER_RUN)),
        suspend_s=from_text(status.get("suspendTime")),
        start_s=from_text(status.get("startTime")),
        completion_s=from_text(status.get("completionTime")),
        manifest=status,
    )
