"""Traces of generation changes: the same story as the events, as spans of a collector."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.bench import SPEC, Bench
from harness.controller import ControllerProcess
from harness.raw_job import PATIENT_LIMITS, RawJob
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from stretto_controller.settings import read_settings
from stretto_controller.tracing import CHANGE, PARTS, Tracing

WAIT_S = 60.0


async def test_a_change_is_one_span_with_its_parts_inside_in_order() -> None:
    exporter = InMemorySpanExporter()
    bench = Bench()
    bench.runner.tracing = tracing = Tracing(exporter)
    bench.join("a", "n0")
    await bench.store.finish()
    bench.wall_s += 5.0
    await bench.train("a")
    bench.wall_s += 2.0
    await bench.progress("a", step=1)
    tracing.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans[CHANGE]
    assert root.attributes is not None
    assert (root.attributes["stretto.job"], root.attributes["stretto.generation"]) == ("a", 1)
    assert root.attributes["stretto.cause"] == "start"
    assert "started with 1 node" in str(root.attributes["stretto.reason"])
    first_step = spans["first step"]
    assert first_step.parent is not None
    assert first_step.parent.span_id == root.context.span_id
    assert first_step.end_time is not None
    assert first_step.start_time is not None
    assert first_step.end_time - first_step.start_time == pytest.approx(7e9, rel=1e-3)
    assert root.end_time == first_step.end_time


async def test_nothing_is_traced_that_is_not_saved() -> None:
    exporter = InMemorySpanExporter()
    bench = Bench()
    bench.runner.tracing = tracing = Tracing(exporter)
    bench.join("a", "n0", SPEC)
    tracing.close()
    assert not exporter.get_finished_spans()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="trace_endpoint is 'collector:4317'; give http://HOST:PORT"):
        read_settings({}, {"STRETTO_TRACE_ENDPOINT": "collector:4317"})


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def Export(self, request: Any, context: Any) -> Any:  # the service's name for it
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def take(self, count: int) -> list[Any]:
        return [self.spans.get(timeout=WAIT_S) for _ in range(count)]


@contextmanager
def _collecting() -> Iterator[tuple[_Collector, str]]:
    collector = _Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.mark.e2e
def test_a_collector_is_told_of_a_start_and_of_a_failure(tmp_path: Path) -> None:
    with _collecting() as (collector, endpoint):
        environment = {**PATIENT_LIMITS, "STRETTO_TRACE_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with ControllerProcess(tmp_path, **environment) as controller, RawJob(controller) as job:
            workers = job.pair()
            assert _of_generation(collector, 1)[CHANGE]["stretto.cause"].string_value == "start"
            workers[0].ask(step=11, failed=True)
            workers[1].hears("cut")
            workers[1].ask(step=11, failed=True)
            for worker in workers:
                worker.place()
            workers[0].progress(20)
            spans = _of_generation(collector, 2)
            assert [name for name in PARTS if name in spans] == [*PARTS]
            assert spans[CHANGE]["stretto.cause"].string_value == "worker_failed"
            assert spans[CHANGE]["stretto.job"].string_value == "a"


def _of_generation(collector: _Collector, number: int) -> dict[str, dict[str, Any]]:
    """The attributes of a change's spans, by name, once its root has come."""
    found: dict[str, dict[str, Any]] = {}
    limit_s = time.monotonic() + WAIT_S
    while CHANGE not in found:
        assert time.monotonic() < limit_s, f"only {sorted(found)} came"
        (span,) = collector.take(1)
        attributes = {attribute.key: attribute.value for attribute in span.attributes}
        if attributes["stretto.generation"].int_value == number:
            found[span.name] = attributes
    return found
