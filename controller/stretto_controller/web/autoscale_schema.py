"""The choice of a job's size in JSON: what the API takes and answers."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleChange, AutoscaleMode, Goal
from stretto_controller.core.goodput.prediction import Recommendation, SizePrediction


class AutoscaleOut(BaseModel):
    mode: AutoscaleMode
    goal: Goal
    efficiency_floor: float
    deadline_s: float | None = Field(description="seconds since the Unix epoch")
    weight: float
    priority: int


class AutoscalePatch(BaseModel):
    """What is to be different; at least one of them."""

    model_config = ConfigDict(extra="forbid")

    mode: AutoscaleMode | None = None
    goal: Goal | None = None
    efficiency_floor: StrictFloat | None = Field(default=None, gt=0, le=1)
    deadline_s: StrictFloat | StrictInt | None = Field(default=None, gt=0, lt=2**53)
    weight: StrictFloat | StrictInt | None = Field(default=None, gt=0, le=1000)
    priority: StrictInt | None = Field(default=None, ge=-(2**31), lt=2**31)

    @model_validator(mode="after")
    def _at_least_one(self) -> AutoscalePatch:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self

    def change(self) -> AutoscaleChange:
        return AutoscaleChange(**self.model_dump())


class SizeOut(BaseModel):
    """What the job would be like at one size."""

    nodes: int
    world_size: int
    scale: float
    gain: float
    step_seconds: float
    step_seconds_error: float | None = Field(description="standard error; null while there are too few points")
    progress_rate: float = Field(description="d(tau)/dt in iterations per second")
    marginal_efficiency: float = Field(description="of each node beyond the size before, 1 at the smallest")
    seen: bool
    extrapolated: bool = Field(description="beyond twice the largest size seen: a guess")


class RecommendationOut(BaseModel):
    nodes: int | None
    reason: str
    points: int = Field(description="different (workers, local batch, accumulation) that were observed")
    remaining_s: float | None
    batch_size: int | None
    accumulation: int | None
    sizes: list[SizeOut]


def autoscale_out(value: Autoscale) -> AutoscaleOut:
    return AutoscaleOut(
        mode=value.mode,
        goal=value.goal,
        efficiency_floor=value.efficiency_floor,
        deadline_s=value.deadline_s or None,
        weight=value.weight,
        priority=value.priority,
    )


def recommendation_out(value: Recommendation) -> RecommendationOut:
    return RecommendationOut(
        nodes=value.nodes or None,
        reason=value.reason,
        points=value.points,
        remaining_s=value.remaining_s if math.isfinite(value.remaining_s) else None,
        batch_size=value.batch_size or None,
        accumulation=value.accumulation or None,
        sizes=[_size_out(size) for size in value.sizes],
    )


def _size_out(size: SizePrediction) -> SizeOut:
    return SizeOut(
        nodes=size.nodes,
        world_size=size.world_size,
        scale=size.scale,
        gain=size.gain,
        step_seconds=size.step_seconds,
        step_seconds_error=size.step_seconds_error or None,
        progress_rate=size.progress_rate,
        marginal_efficiency=size.marginal_efficiency,
        seen=size.seen,
        extrapolated=size.extrapolated,
    )
