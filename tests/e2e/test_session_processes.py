"""A worker's session in a process of its own: what SIGTERM does, and what becomes of it when its agent dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_training import WAIT_S, Script, ScriptedTraining, Server, welcome_and_listen
from stretto_proto.v1 import training_pb2 as pb

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).with_name("scripts") / "session.py"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def _environment(endpoint: str, agent_pid: int) -> dict[str, str]:
    return {
        **os.environ,
        "STRETTO_ENDPOINT": endpoint,
        "STRETTO_JOB": "job",
        "STRETTO_NODE": "node-a",
        "STRETTO_GENERATION": "4",
        "STRETTO_AGENT_PID": str(agent_pid),
        "RANK": "0",
        "LOCAL_RANK": "0",
    }


def _start(endpoint: str, mode: str, *, flush_limit_s: float = WAIT_S) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), mode, str(flush_limit_s)],
        env=_environment(endpoint, os.getpid()),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _hear(servicer: ScriptedTraining, kind: str) -> pb.TrainRequest:
    while True:
        request = servicer.heard.get(timeout=WAIT_S)
        if request.WhichOneof("body") == kind:
            return request


def _answer_draining(body: pb.TrainResponse) -> Script:
    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        for request in requests:
            if request.HasField("hello"):
                yield pb.TrainResponse(welcome=pb.WorkerWelcome(scale=1.0))
            if request.HasField("draining"):
                yield body

    return script


def test_sigterm_during_training_is_told_to_the_controller_even_from_inside_a_blocking_call(server: Server) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    process = _start(server.endpoint, "blocked")
    process.terminate()
    assert _hear(servicer, "draining").draining.generation == 4
    began_s = time.monotonic()
    assert process.wait(WAIT_S) == 143, "nobody ended the generation within the limit"
    assert time.monotonic() - began_s > 1.0


def test_sigterm_ends_a_worker_at_once_whose_generation_is_being_stopped(server: Server) -> None:
    fenced = pb.TrainResponse(fenced=pb.WorkerFenced(generation=4, reason="node-b is gone"))
    server.start(ScriptedTraining(_answer_draining(fenced)))
    process = _start(server.endpoint, "blocked")
    began_s = time.monotonic()
    process.terminate()
    assert process.wait(WAIT_S) == 0
    assert time.monotonic() - began_s < 1.5


def test_sigterm_ends_a_worker_that_has_left_after_its_last_words_were_heard(server: Server) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    process = _start(server.endpoint, "left")
    process.terminate()
    assert process.wait(WAIT_S) == 0
    assert _hear(servicer, "left").left.step == 7


def test_sigterm_ends_a_worker_that_has_left_although_the_controller_is_down() -> None:
    process = _start("127.0.0.1:1", "left", flush_limit_s=0.1)
    process.terminate()
    assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("between", [False, True], ids=["direct child", "below a shell"])
def test_a_worker_dies_with_its_agent(server: Server, between: bool) -> None:
    server.start(ScriptedTraining(welcome_and_listen))
    worker = f"{sys.executable} {SCRIPT} blocked 1"
    # The shell is the agent, or stands between a sleeping agent and the worker.
    command = f"STRETTO_AGENT_PID=$$; export STRETTO_AGENT_PID; {worker} & wait"
    if between:
        command = f"STRETTO_AGENT_PID=$$; export STRETTO_AGENT_PID; sh -c '{worker} & echo $!; wait' & wait"
    agent = subprocess.Popen(
        ["sh", "-c", command], env=_environment(server.endpoint, 1), stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    while agent.stdout.readline() != "ready\n":
        pass
    agent.kill()
    agent.wait(WAIT_S)
    # The worker holds the other end: reading ends when it is gone.
    assert agent.stdout.read() == ""
