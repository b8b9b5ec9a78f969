"""A worker's session: what it says, and when; first the pure part, then against a scripted controller."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from scripted_training import WAIT_S, ScriptedTraining, Server, welcome_and_listen
from stretto.histogram import Histogram
from stretto.progress_report import StepFigures
from stretto.session import Session, SessionSettings
from stretto.session_state import Identity, OnSigterm, SessionState
from stretto.stream import StreamSettings
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

IDENTITY = Identity(job="digits", node_id="node-a", generation=4, rank=0, local_rank=0)
SPEC = types_pb2.JobSpec(base_batch_size=16, batch_size=16, target_tau=2000)
FIGURES = StepFigures(
    step=1,
    tau=1.5,
    tau_before=0.0,
    gain=1.5,
    scale=2.0,
    loss=0.7,
    effective_lr=(0.045,),
    base_lr=(0.03,),
    variance=3.0,
    sqr_norm=1.0,
    samples=32,
    epoch=0,
    step_s=0.04,
)


def _state() -> SessionState:
    return SessionState(IDENTITY, SPEC)


def _kinds(messages: list[pb.TrainRequest]) -> list[str | None]:
    return [message.WhichOneof("body") for message in messages]


def test_a_new_worker_says_hello_and_nothing_else() -> None:
    (hello,) = _state().opening()
    assert hello.hello.job == "digits"
    assert hello.hello.generation == 4
    assert hello.hello.spec == SPEC


def test_progress_carries_sums_over_the_generation_so_that_one_message_replaces_all_lost_ones() -> None:
    state = _state()
    state.progress.commit(replace(FIGURES, step=8, gain=1.25), pause_s=2.5)
    state.progress.commit(replace(FIGURES, step=9, gain=1.75), pause_s=0.0)
    progress = state.progress.message().progress
    assert progress.generation_steps == 2
    assert progress.generation_gain_sum == 3.0
    assert progress.generation_first_tau == 0.0
    assert progress.pause_s == 2.5
    assert progress.step == 9
    assert progress.step_seconds.count == 2
    assert not state.progress.unsent


def test_a_diverged_loss_is_reported_as_it_is() -> None:
    state = _state()
    state.progress.commit(replace(FIGURES, loss=math.nan), pause_s=0.0)
    assert math.isnan(state.progress.message().progress.loss)


def test_a_new_connection_hears_everything_that_the_last_one_may_have_lost() -> None:
    state = _state()
    state.progress.commit(FIGURES, pause_s=0.0)
    state.checkpoint(types_pb2.CheckpointCommitted(generation=4, step=1))
    assert _kinds(state.opening()) == ["hello", "progress", "checkpoint"]
    state.drain()
    assert _kinds(state.opening())[3:] == ["draining"]
    state.leave(1)
    assert _kinds(state.opening())[3:] == ["left"]
    state.finish(1, 1.5)
    assert _kinds(state.opening())[3:] == ["finished"]
    assert state.opening()[0].hello.step == 1


def test_what_is_said_to_another_generation_changes_nothing() -> None:
    state = _state()
    state.hear(pb.TrainResponse(leave=pb.LeaveGeneration(generation=3, reason="late")))
    state.hear(pb.TrainResponse(fenced=pb.WorkerFenced(generation=3, reason="late")))
    assert state.leave_reason is None
    assert state.fenced_reason is None
    state.hear(pb.TrainResponse(leave=pb.LeaveGeneration(generation=4, reason="node-b joins")))
    assert state.leave_reason == "node-b joins"


def test_the_scale_is_the_controllers_and_unknown_until_it_is_known() -> None:
    state = _state()
    state.hear(pb.TrainResponse(welcome=pb.WorkerWelcome(scale=0.0)))
    assert state.scale is None
    state.hear(pb.TrainResponse(welcome=pb.WorkerWelcome(scale=2.5)))
    assert state.scale == 2.5


def test_sigterm_is_a_drain_while_training_and_the_end_afterwards() -> None:
    state = _state()
    assert state.on_sigterm() is OnSigterm.DRAIN
    state.leave(3)
    assert state.on_sigterm() is OnSigterm.EXIT


def test_sigterm_ends_a_fenced_or_refused_worker_at_once() -> None:
    fenced, refused = _state(), _state()
    fenced.hear(pb.TrainResponse(fenced=pb.WorkerFenced(generation=4, reason="generation 5 runs")))
    assert fenced.on_sigterm() is OnSigterm.EXIT
    refused.refused = True
    assert refused.on_sigterm() is OnSigterm.EXIT


def test_a_checkpoint_is_asked_for_in_one_generation() -> None:
    state = _state()
    state.hear(pb.TrainResponse(save=pb.SaveCheckpoint(generation=3)))
    assert not state.save_asked
    state.hear(pb.TrainResponse(save=pb.SaveCheckpoint(generation=4, reason="asked")))
    assert state.save_asked


def test_sigterm_leaves_a_finished_worker_time_for_its_last_lines() -> None:
    state = _state()
    state.finish(10, 2000.0)
    assert state.on_sigterm() is OnSigterm.DRAIN


def test_histogram_counts_what_is_on_a_bound_below_it() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    assert histogram.cumulative_counts == (2, 3)
    assert histogram.count == 4
    assert histogram.sum == pytest.approx(7.65)


def test_histogram_refuses_bounds_that_do_not_rise() -> None:
    with pytest.raises(ValueError, match="each above the last"):
        Histogram((1.0, 1.0))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def sessions() -> Iterator[Any]:
    made: list[Session] = []

    def make(endpoint: str, **settings: Any) -> Session:
        given = SessionSettings(stream=StreamSettings(max_backoff_s=0.1), flush_limit_s=WAIT_S, **settings)
        made.append(Session((endpoint,), IDENTITY, SPEC, given))
        made[-1].start()
        return made[-1]

    yield make
    for session in made:
        session.close()


def _next(servicer: ScriptedTraining, kind: str) -> pb.TrainRequest:
    """The next message of this kind, past others."""
    while True:
        request = servicer.heard.get(timeout=WAIT_S)
        if request.WhichOneof("body") == kind:
            return request


def _until_left(servicer: ScriptedTraining) -> list[pb.TrainRequest]:
    heard = [servicer.next_heard()]
    while not heard[-1].HasField("left"):
        heard.append(servicer.next_heard())
    return heard


def test_reports_the_latest_of_many_steps_without_blocking_any(server: Server, sessions: Any) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    session = sessions(server.endpoint)
    for step in range(5_000):
        session.report(replace(FIGURES, step=step))
    session.left(4_999)
    heard = _until_left(servicer)
    steps = [request.progress.step for request in heard if request.HasField("progress")]
    assert len(steps) < 100, "progress is rate-limited"
    assert steps[-1] == 4_999, "the latest figures come before the farewell"


def test_sends_the_last_figures_of_a_burst_although_no_step_follows(server: Server, sessions: Any) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    session = sessions(server.endpoint, report_interval_s=0.01)
    _next(servicer, "hello")
    for step in (1, 2, 3):
        session.report(replace(FIGURES, step=step))
    while _next(servicer, "progress").progress.step != 3:
        pass


def test_buffers_while_the_controller_is_down_and_says_it_when_it_is_back(server: Server, sessions: Any) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    server.stop()
    session = sessions(server.endpoint)
    session.report(replace(FIGURES, step=41))
    session.checkpoint_committed(41, 50.0, "/checkpoints/41")
    session.left(41)
    server.start(servicer)
    heard = _until_left(servicer)
    assert heard[0].HasField("hello")
    assert 41 in [request.progress.step for request in heard]
    assert "/checkpoints/41" in [request.checkpoint.path for request in heard]
    assert heard[-1].left.step == 41


def test_learns_the_scale_and_the_wish_to_leave(server: Server, sessions: Any) -> None:
    looked = threading.Event()

    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        next(requests)
        yield pb.TrainResponse(welcome=pb.WorkerWelcome(scale=2.0))
        assert looked.wait(WAIT_S)
        yield pb.TrainResponse(leave=pb.LeaveGeneration(generation=4, reason="node-b joins"))
        for _ in requests:
            pass

    server.start(ScriptedTraining(script, welcome_and_listen))
    session = sessions(server.endpoint)
    assert not session.leave_requested
    looked.set()
    deadline_s = time.monotonic() + WAIT_S
    while not session.leave_requested:
        assert time.monotonic() < deadline_s, "the wish was not heard"
        time.sleep(0.01)
    assert session.scale == 2.0


@pytest.mark.parametrize("missing", ["STRETTO_ENDPOINT", "STRETTO_JOB", "STRETTO_NODE", "STRETTO_GENERATION"])
def test_there_is_no_session_without_an_agent_of_stretto(missing: str) -> None:
    environ = {
        "STRETTO_ENDPOINT": "127.0.0.1:1",
        "STRETTO_JOB": "digits",
        "STRETTO_NODE": "node-a",
        "STRETTO_GENERATION": "4",
    }
    del environ[missing]
    assert Session.from_environment(SPEC, environ=environ) is None


def test_a_broken_environment_is_named() -> None:
    environ = {
        "STRETTO_ENDPOINT": "127.0.0.1:1",
        "STRETTO_JOB": "digits",
        "STRETTO_NODE": "node-a",
        "STRETTO_GENERATION": "four",
    }
    with pytest.raises(ValueError, match=r"STRETTO_GENERATION is 'four'.*torchrun --rdzv-backend=stretto"):
        Session.from_environment(SPEC, environ=environ)
