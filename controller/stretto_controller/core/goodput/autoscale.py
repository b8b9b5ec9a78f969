"""What a person wants of the choice of a job's size: mode, goal and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from stretto_controller.core.errors import Rejected


class AutoscaleMode(StrEnum):
    # Sizes are predicted, none is recommended.
    OFF = "off"
    RECOMMEND = "recommend"
    # The controller changes how many nodes are wanted, until a person does.
    ACT = "act"


class Goal(StrEnum):
    # The best progress rate whose marginal efficiency is above the floor.
    PROGRESS = "progress"
    # The fewest worker-hours per unit of tau.
    COST = "cost"
    # The target tau by the deadline, with the fewest nodes.
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Autoscale:
    """How a job's size is chosen. The durable part of it: it belongs to the job's record."""

    mode: AutoscaleMode = AutoscaleMode.RECOMMEND
    goal: Goal = Goal.PROGRESS
    # What each added node must bring at least, as a share of what a node brings at min_nodes. Lower: larger sizes.
    efficiency_floor: float = 0.5
    # Wall-clock seconds since the Unix epoch; 0: none.
    deadline_s: float = 0.0
    # Where jobs share nodes: the factor on this job's log-speedup.
    weight: float = 1.0
    # Where there are not nodes enough for every job's minimum, higher ones get theirs first.
    priority: int = 0

    def validate(self) -> None:
        """Raise Rejected, saying what was given and what is allowed."""
        if not 0 < self.efficiency_floor <= 1:
            raise Rejected.invalid(
                f"efficiency_floor is {self.efficiency_floor}; it must be above 0 and at most 1 (0.5 is usual)"
            )
        if not 0 < self.weight <= 1000:
            raise Rejected.invalid(f"weight is {self.weight}; it must be above 0 and at most 1000 (1 is usual)")
        if not 0 <= self.deadline_s < math.inf:
            raise Rejected.invalid(f"deadline_s is {self.deadline_s}; it must be finite seconds since the Unix epoch")
        if self.goal is Goal.DEADLINE and not self.deadline_s:
            raise Rejected.invalid("the goal is deadline, and no deadline is known: give deadline_s, too")


@dataclass(frozen=True, slots=True)
class AutoscaleChange:
    """What is to be different. None: it stays as it is."""

    mode: AutoscaleMode | None = None
    goal: Goal | None = None
    efficiency_floor: float | None = None
    deadline_s: float | None = None
    weight: float | None = None
    priority: int | None = None

    def applied(self, to: Autoscale) -> Autoscale:
        """The settings with what was said. Raises Rejected for what is not allowed, or contradicts itself."""
        if self.deadline_s and self.goal not in (None, Goal.DEADLINE):
            raise Rejected.invalid(f"a deadline was given with the goal {self.goal}; it needs the goal deadline")
        said = {name: getattr(self, name) for name in self.__dataclass_fields__ if getattr(self, name) is not None}
        if self.deadline_s:
            said["goal"] = Goal.DEADLINE
        changed = replace(to, **said)
        changed.validate()
        return changed


def words(autoscale: Autoscale) -> str:
    """The settings as an event tells them."""
    told = [f"mode {autoscale.mode}", f"goal {autoscale.goal}", f"efficiency floor {autoscale.efficiency_floor:g}"]
    if autoscale.weight != 1.0:
        told.append(f"weight {autoscale.weight:g}")
    if autoscale.priority:
        told.append(f"priority {autoscale.priority}")
    return ", ".join(told)
