"""ElasticTrainer on one process with a scripted controller: leaving, refusals, the scale."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from scripted_training import WAIT_S, ScriptedTraining, Server
from stretto.checkpoint import Checkpointer, Fenced
from stretto.errors import Fatal, Rejoin
from stretto.session import SessionSettings
from stretto.trainer import ElasticTrainer, StepReport
from stretto_proto.v1 import training_pb2 as pb
from trainer_run import Plan, make_trainer

GENERATION = 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    for name, value in {
        "STRETTO_JOB": "job",
        "STRETTO_NODE": "node-a",
        "STRETTO_GENERATION": str(GENERATION),
        "RANK": "0",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def _trainer(server: Server, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> ElasticTrainer:
    monkeypatch.setenv("STRETTO_ENDPOINT", server.endpoint)
    session = SessionSettings(stop_limit_s=0.01, report_interval_s=0.01, flush_limit_s=WAIT_S)
    return make_trainer(Plan(target_tau=1e9, settings={"session": session}, **plan))


def _welcome(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
    for request in requests:
        if request.HasField("hello"):
            yield pb.TrainResponse(welcome=pb.WorkerWelcome(scale=1.0))


def _until(kind: str, servicer: ScriptedTraining) -> pb.TrainRequest:
    while True:
        request = servicer.heard.get(timeout=WAIT_S)
        if request.WhichOneof("body") == kind:
            return request


def test_leaves_after_a_step_with_its_state_saved(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        for request in requests:
            if request.HasField("hello"):
                yield pb.TrainResponse(welcome=pb.WorkerWelcome(scale=1.0))
            if request.HasField("progress"):
                yield pb.TrainResponse(leave=pb.LeaveGeneration(generation=GENERATION, reason="node-b joins"))

    servicer = ScriptedTraining(script)
    server.start(servicer)
    reports: list[StepReport] = []
    with pytest.raises(Rejoin, match="did not stop this worker"):
        reports.extend(_trainer(server, monkeypatch, checkpoint=str(tmp_path)))
    assert reports[-1].generation == GENERATION
    committed = _until("checkpoint", servicer).checkpoint
    assert committed.step == reports[-1].step, "the step's report comes before the worker leaves"
    assert committed.size_bytes > 0
    assert _until("left", servicer).left.step == reports[-1].step
    found = Checkpointer(tmp_path).load_latest({})
    assert found is not None
    assert (found.generation, found.step) == (GENERATION, reports[-1].step)


def test_reports_its_spec_and_its_figures(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    servicer = ScriptedTraining(_welcome)
    server.start(servicer)
    for report in _trainer(server, monkeypatch):
        if report.step == 20:
            break
    hello = _until("hello", servicer).hello
    assert (hello.spec.base_batch_size, hello.spec.batch_size, hello.spec.target_tau) == (4, 4, 1e9)
    progress = _until("progress", servicer).progress
    while progress.step != 20:
        progress = _until("progress", servicer).progress
    assert progress.generation_steps == 20
    assert progress.samples == report.samples
    assert progress.tau == report.tau
    assert progress.step_seconds.count == 20
    assert list(progress.effective_lr) == list(report.effective_lr)


def test_another_scale_than_the_controllers_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        for _ in requests:
            yield pb.TrainResponse(welcome=pb.WorkerWelcome(scale=3.0))

    server.start(ScriptedTraining(script))
    with pytest.raises(Fatal, match=r"the controller says S = 3 .* which is S = 1: give the same base_batch_size"):
        list(_trainer(server, monkeypatch))


def test_a_spec_that_the_controller_refuses_ends_training_with_its_words(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        next(requests)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "batch_size is 4 here, but the job runs with batch_size 8")
        yield pb.TrainResponse()

    server.start(ScriptedTraining(script))
    with pytest.raises(Fatal, match="the job runs with batch_size 8"):
        list(_trainer(server, monkeypatch))


def test_a_controller_that_has_lost_the_job_does_not_stop_training(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Event()

    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        next(requests)
        refused.set()
        context.abort(grpc.StatusCode.NOT_FOUND, "there is no job 'job'")
        yield pb.TrainResponse()

    server.start(ScriptedTraining(script))
    trainer = _trainer(server, monkeypatch)
    steps_after = 0
    for _ in trainer:
        steps_after += refused.is_set()
        if steps_after == 100:
            break


def test_an_older_generation_may_not_save_any_more(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.start(ScriptedTraining(_welcome))
    trainer = _trainer(server, monkeypatch, checkpoint=str(tmp_path))
    next(iter(trainer))
    Checkpointer(tmp_path).fence(GENERATION + 1)
    with pytest.raises(Fenced, match=f"generation {GENERATION + 1} has begun"):
        trainer.save()
