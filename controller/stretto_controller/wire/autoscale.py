"""The choice of a size on the wire: settings in and out, recommendations out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from stretto_proto.v1 import types_pb2 as types

from stretto_controller.core.errors import Rejected
from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleChange, AutoscaleMode, Goal
from stretto_controller.core.goodput.prediction import Recommendation, SizePrediction
from stretto_controller.wire import checks

_PRIORITY_LIMIT = 2**31
_MODES = {
    types.AUTOSCALE_MODE_OFF: AutoscaleMode.OFF,
    types.AUTOSCALE_MODE_RECOMMEND: AutoscaleMode.RECOMMEND,
    types.AUTOSCALE_MODE_ACT: AutoscaleMode.ACT,
}
_GOALS = {
    types.AUTOSCALE_GOAL_PROGRESS: Goal.PROGRESS,
    types.AUTOSCALE_GOAL_COST: Goal.COST,
    types.AUTOSCALE_GOAL_DEADLINE: Goal.DEADLINE,
}
_MODE_NUMBERS = {mode: number for number, mode in _MODES.items()}
_GOAL_NUMBERS = {goal: number for number, goal in _GOALS.items()}
WordT = TypeVar("WordT", bound=StrEnum)


def change(message: types.Autoscale) -> AutoscaleChange:
    """What a person said; the core checks what it amounts to."""
    return AutoscaleChange(
        mode=_known("mode", message.mode, _MODES),
        goal=_known("goal", message.goal, _GOALS),
        efficiency_floor=checks.amount("efficiency_floor", message.efficiency_floor) or None,
        deadline_s=checks.amount("deadline_s", message.deadline_s) or None,
        weight=checks.amount("weight", message.weight) or None,
        priority=message.priority if message.HasField("priority") else None,
    )


def _known(field: str, number: int, words: Mapping[Any, WordT]) -> WordT | None:
    """The word for an enum's number; None for 0, which says nothing."""
    if number and number not in words:
        raise Rejected.invalid(f"{field} is {number}; known are {', '.join(words.values())}")
    return words.get(number)


def autoscale(value: Autoscale) -> types.Autoscale:
    return types.Autoscale(
        mode=_MODE_NUMBERS[value.mode],
        goal=_GOAL_NUMBERS[value.goal],
        efficiency_floor=value.efficiency_floor,
        deadline_s=value.deadline_s,
        weight=value.weight,
        priority=value.priority,
    )


def recommendation(value: Recommendation) -> types.Recommendation:
    return types.Recommendation(
        nodes=value.nodes,
        reason=value.reason,
        sizes=map(_size, value.sizes),
        points=value.points,
        remaining_s=-1.0 if math.isnan(value.remaining_s) else value.remaining_s,
        batch_size=value.batch_size,
        accumulation=value.accumulation,
    )


def _size(value: SizePrediction) -> types.SizePrediction:
    return types.SizePrediction(
        nodes=value.nodes,
        world_size=value.world_size,
        scale=value.scale,
        gain=value.gain,
        step_seconds=value.step_seconds,
        step_seconds_error=value.step_seconds_error,
        progress_rate=value.progress_rate,
        marginal_efficiency=value.marginal_efficiency,
        seen=value.seen,
        extrapolated=value.extrapolated,
    )
