"""What the HTTP API answers, in JSON. Numbers that are not known, or not finite, are null."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from stretto_controller.core.events import JobCreated
from stretto_controller.core.goodput.autoscale import AutoscaleChange
from stretto_controller.core.model import Generation, JobSpec, Mode, NodeState
from stretto_controller.curve import Curve
from stretto_controller.snapshot import JobView
from stretto_controller.store.contents import GenerationSummary, StoredEvent
from stretto_controller.web.autoscale_schema import (
    AutoscaleOut,
    AutoscalePatch,
    RecommendationOut,
    autoscale_out,
    recommendation_out,
)

# Of a point's figures; seven digits are more than a chart can show.
_FORMATS = {"time_s": "%.3f", "generation": "%d", "step": "%d"}


class Spec(BaseModel):
    """Zero, or null, means that it was not said yet."""

    min_nodes: int
    max_nodes: int
    mode: str | None
    base_batch_size: int
    batch_size: int
    global_batch_size: int
    target_tau: float


class NodeOut(BaseModel):
    node_id: str
    state: str
    node_rank: int | None
    slots: int
    address: str
    connected: bool
    silent_s: float | None
    first_rank: int | None
    step_s: float | None = Field(description="the slowest of its workers' usual steps")


class GenerationOut(BaseModel):
    number: int
    members: list[str]
    world_size: int
    scale: float | None
    reason: str


class ProgressOut(BaseModel):
    generation: int
    step: int
    tau: float | None
    gain: float | None
    loss: float | None
    effective_lr: list[float | None]
    base_lr: list[float | None]
    variance: float | None
    sqr_norm: float | None
    samples: int
    epoch: int


class CheckpointOut(BaseModel):
    generation: int
    step: int
    tau: float
    path: str
    size_bytes: int
    duration_s: float
    time_s: float = Field(description="seconds since the Unix epoch")


class SavesOut(BaseModel):
    """Of the checkpoints that were committed since this controller started."""

    count: int
    mean_s: float | None = Field(description="how long one took to write")


class JobOut(BaseModel):
    name: str
    incarnation: int
    phase: str
    reason: str
    paused: bool
    desired_nodes: int
    saves: SavesOut
    spec: Spec
    nodes: list[NodeOut]
    generation: GenerationOut | None
    progress: ProgressOut | None
    progress_rate: float = Field(description="d(tau)/dt in iterations per second; 0 until known")
    remaining_s: float | None
    checkpoint: CheckpointOut | None
    autoscale: AutoscaleOut
    recommendation: RecommendationOut | None = Field(description="null until the job's size was looked at")


class JobsOut(BaseModel):
    jobs: list[JobOut]


class GenerationSummaryOut(BaseModel):
    incarnation: int
    generation: GenerationOut
    cause: str
    started_s: float = Field(description="seconds since the Unix epoch")
    ended_s: float | None
    pause_s: float | None
    steps: int
    mean_gain: float | None
    effective_lr: float | None
    first_tau: float | None
    last_tau: float | None
    end_reason: str


class PointsOut(BaseModel):
    """The job's curve: value i of each list belongs to point i. Null where a figure is not a finite number."""

    time_s: list[float] = Field(description="seconds since the Unix epoch")
    generation: list[int]
    step: list[int]
    tau: list[float]
    gain: list[float | None]
    scale: list[float]
    loss: list[float | None]
    effective_lr: list[float | None]
    base_lr: list[float | None]
    progress_rate: list[float]


class HistoryOut(BaseModel):
    generations: list[GenerationSummaryOut]
    points: PointsOut


class EventOut(BaseModel):
    sequence: int
    time_s: float = Field(description="seconds since the Unix epoch")
    kind: str
    reason: str
    node_id: str
    generation: int


class EventsOut(BaseModel):
    events: list[EventOut]


def _whole(value: object) -> object:
    """To JSON, 4.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


NodeCount = Annotated[StrictInt, Field(ge=1, le=2**31 - 1), BeforeValidator(_whole)]


class JobPatch(BaseModel):
    """What is wanted of the job: exactly one of the four."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1, "maxProperties": 1})

    nodes: NodeCount | SkipJsonSchema[None] = None
    paused: StrictBool | SkipJsonSchema[None] = None
    checkpoint: Literal[True] | SkipJsonSchema[None] = Field(
        default=None, description="write one at the next step boundary"
    )
    autoscale: AutoscalePatch | SkipJsonSchema[None] = None

    @model_validator(mode="before")
    @classmethod
    def _exactly_one(cls, given: object) -> object:
        if isinstance(given, dict) and (len(given) != 1 or None in given.values()):
            raise ValueError(
                'give exactly one of {"nodes": n}, {"paused": true or false}, {"checkpoint": true} and '
                '{"autoscale": {"mode": ...}}'
            )
        return given


class JobCreate(BaseModel):
    """A job before any node comes. Zero: not said."""

    model_config = ConfigDict(extra="forbid")

    name: str
    min_nodes: StrictInt = Field(ge=1, le=2**31 - 1)
    max_nodes: StrictInt = Field(ge=1, le=2**31 - 1)
    mode: Literal["restart", "in-process"] = "in-process"
    base_batch_size: StrictInt = Field(default=0, ge=0, le=2**53 - 1)
    batch_size: StrictInt = Field(default=0, ge=0, le=2**53 - 1)
    global_batch_size: StrictInt = Field(default=0, ge=0, le=2**53 - 1)
    target_tau: StrictFloat | StrictInt = Field(default=0.0, ge=0, lt=2**53)
    desired_nodes: StrictInt = Field(default=0, ge=0, le=2**31 - 1, description="0 means max_nodes")
    autoscale: AutoscalePatch | None = None

    def event(self) -> JobCreated:
        """Raises Rejected for a spec that no job can have."""
        spec = JobSpec(
            self.min_nodes,
            self.max_nodes,
            Mode(self.mode),
            self.base_batch_size,
            self.batch_size,
            self.global_batch_size,
            float(self.target_tau),
        )
        spec.validate()
        return JobCreated(spec, self.desired_nodes, self.autoscale.change() if self.autoscale else AutoscaleChange())


class ProblemOut(BaseModel):
    """Every error, as RFC 9457 has it (application/problem+json)."""

    type: str = Field(description="urn:stretto:problem: and a short, stable word")
    title: str = Field(description="the status in words")
    status: int
    detail: str = Field(description="what was given, what is allowed, and what to do")
    instance: str = Field(description="the path that was asked for")


class Health(BaseModel):
    status: Literal["ok", "ready", "not ready"]
    reason: str = ""


def known(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def job_out(view: JobView) -> JobOut:
    record, progress, checkpoint = view.record, view.progress, view.record.checkpoint
    spec, saves = record.spec, view.figures.checkpoint_seconds.histogram
    return JobOut(
        name=record.name,
        incarnation=record.incarnation,
        phase=record.phase.value,
        reason=record.reason,
        paused=record.paused,
        desired_nodes=record.wanted_nodes,
        saves=SavesOut(count=saves.count, mean_s=saves.sum / saves.count if saves.count else None),
        spec=Spec(
            min_nodes=spec.min_nodes,
            max_nodes=spec.max_nodes,
            mode=spec.mode.value if spec.mode else None,
            base_batch_size=spec.base_batch_size,
            batch_size=spec.batch_size,
            global_batch_size=spec.global_batch_size,
            target_tau=spec.target_tau,
        ),
        nodes=[
            NodeOut(
                node_id=shown.node.node_id,
                state=shown.node.state.value,
                node_rank=shown.node_rank if shown.node_rank >= 0 else None,
                slots=shown.node.slots,
                address=shown.node.address,
                connected=shown.connected,
                silent_s=known(shown.silent_s),
                first_rank=shown.first_rank if shown.first_rank >= 0 else None,
                step_s=known(shown.step_s),
            )
            for shown in view.nodes
        ],
        generation=generation_out(record.generation) if record.generation else None,
        progress=ProgressOut(
            generation=progress.generation,
            step=progress.step,
            tau=known(progress.tau),
            gain=known(progress.gain),
            loss=known(progress.loss),
            effective_lr=[known(rate) for rate in progress.effective_lr],
            base_lr=[known(rate) for rate in progress.base_lr],
            variance=known(progress.variance),
            sqr_norm=known(progress.sqr_norm),
            samples=progress.samples,
            epoch=progress.epoch,
        )
        if progress
        else None,
        progress_rate=view.progress_rate,
        remaining_s=known(view.remaining_s),
        checkpoint=CheckpointOut(
            generation=checkpoint.generation,
            step=checkpoint.step,
            tau=checkpoint.tau,
            path=checkpoint.path,
            size_bytes=checkpoint.size_bytes,
            duration_s=checkpoint.duration_s,
            time_s=view.marks.checkpoint_s,
        )
        if checkpoint
        else None,
        autoscale=autoscale_out(record.autoscale),
        recommendation=recommendation_out(view.recommendation) if view.recommendation else None,
    )


def brief_text(view: JobView) -> str:
    """What a list of jobs shows of one, as JSON."""
    record, progress, generation = view.record, view.progress, view.record.generation
    states = [node.state for node in record.nodes.values()]
    return json.dumps(
        {
            "name": record.name,
            "incarnation": record.incarnation,
            "phase": record.phase.value,
            "reason": record.reason,
            "paused": record.paused,
            "active_nodes": states.count(NodeState.ACTIVE),
            "desired_nodes": record.wanted_nodes,
            "min_nodes": record.spec.min_nodes,
            "max_nodes": record.spec.max_nodes,
            "target_tau": record.spec.target_tau,
            "scale": (generation.scale or None) if generation else None,
            "tau": known(progress.tau) if progress else None,
            "gain": known(progress.gain) if progress else None,
            "loss": known(progress.loss) if progress else None,
            "progress_rate": view.progress_rate,
            "remaining_s": known(view.remaining_s),
        }
    )


def points_text(curve: Curve, after_s: float = -math.inf) -> str:
    """`PointsOut` as JSON, made without an object for each number: there are tens of thousands."""
    columns = (f'"{name}":[{column_text(name, values)}]' for name, values in curve.columns(after_s))
    return f"{{{','.join(columns)}}}"


def column_text(name: str, values: Iterable[float]) -> str:
    text = ",".join(map(_FORMATS.get(name, "%.7g").__mod__, values))
    return re.sub("-?(?:nan|inf)", "null", text) if "n" in text else text


def generation_out(generation: Generation) -> GenerationOut:
    return GenerationOut(
        number=generation.number,
        members=list(generation.node_ids),
        world_size=generation.world_size,
        scale=generation.scale or None,
        reason=generation.reason,
    )


def summary_out(summary: GenerationSummary) -> GenerationSummaryOut:
    return GenerationSummaryOut(
        incarnation=summary.incarnation,
        generation=generation_out(summary.generation),
        cause=summary.cause.value,
        started_s=summary.started_s,
        ended_s=summary.ended_s or None,
        pause_s=known(summary.pause_s),
        steps=summary.steps,
        mean_gain=known(summary.mean_gain),
        effective_lr=known(summary.effective_lr),
        first_tau=known(summary.first_tau),
        last_tau=known(summary.last_tau),
        end_reason=summary.end_reason,
    )


def event_out(event: StoredEvent) -> EventOut:
    return EventOut(
        sequence=event.sequence,
        time_s=event.time_s,
        kind=event.kind,
        reason=event.reason,
        node_id=event.node_id,
        generation=event.generation,
    )
