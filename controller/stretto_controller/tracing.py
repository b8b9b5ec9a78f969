"""OpenTelemetry traces of generation changes, with `stretto[tracing]` and a collector's address.

One trace for each change: the span `generation change`, and within it one span for each part that the pause is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from stretto_controller.change_clock import ChangeClock, ChangeTimes
from stretto_controller.core.actions import Action
from stretto_controller.core.model import JobState

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

CHANGE = "generation change"
# Each span is named after what it ends with, and begins where the one before ended.
PARTS = ("prepared", "left", "assigned", "first step")
_NS = 1_000_000_000


class Tracing:
    """Sends the changes of all jobs to one exporter, on a thread of its own; what it cannot send is dropped."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "stretto-controller"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("stretto.controller")
        self._clocks: dict[str, ChangeClock] = {}

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """To the collector at an http:// or https:// address, by OTLP over gRPC; OTEL_EXPORTER_OTLP_... says the rest.

        Raises ValueError where the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError as error:
            raise ValueError(f"trace_endpoint needs {error.name}: pip install 'stretto[tracing]'") from error
        return cls(OTLPSpanExporter(endpoint=endpoint))

    def note(self, job: str, state: JobState, actions: Sequence[Action], wall_s: float) -> None:
        """Take up one decision, once it is saved."""
        clock = self._clocks.setdefault(job, ChangeClock(job))
        for change in clock.note(state, actions, wall_s):
            self._send(change)

    def forget(self, job: str) -> None:
        self._clocks.pop(job, None)

    def close(self) -> None:
        """Send what waits; blocks for as long as the collector takes."""
        self._provider.shutdown()

    def _send(self, change: ChangeTimes) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        moments = (change.started_s, change.prepared_s, change.left_s, change.assigned_s, change.first_step_s)
        known = [moment for moment in moments if moment is not None]
        attributes: dict[str, str | int | bool] = {
            "stretto.job": change.job,
            "stretto.generation": change.generation,
            "stretto.cause": str(change.cause or ""),
            "stretto.reason": change.reason,
            "stretto.planned": change.planned,
        }
        root = self._tracer.start_span(CHANGE, start_time=int(known[0] * _NS), attributes=attributes)
        inside = set_span_in_context(root)
        for part, (begin_s, end_s) in zip(PARTS, pairwise(moments), strict=True):
            if begin_s is None or end_s is None:
                continue
            span = self._tracer.start_span(part, inside, start_time=int(begin_s * _NS), attributes=attributes)
            span.end(int(end_s * _NS))
        if change.first_step_s is None:
            root.set_status(Status(StatusCode.ERROR, "the generation ended before its first step"))
        root.end(int(known[-1] * _NS))
