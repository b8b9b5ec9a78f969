"""A worker's conversation with the controller: progress goes out, requests to leave come in.

Nothing here blocks a training step, and a controller that is down disturbs nothing: progress is buffered (the
latest replaces the rest), and what must not be lost is said again when the connection is back. No torch here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields

from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2
from stretto_proto.v1.training_pb2_grpc import TrainingStub

from stretto.channel import ENDPOINT_VARIABLE, parse_endpoints
from stretto.errors import Fatal, NotFound, Rejoin
from stretto.process import AGENT_PID_VARIABLE, die_with_agent, process_age_s
from stretto.progress_report import StepFigures
from stretto.session_state import Identity, OnSigterm, SessionState
from stretto.stream import ReconnectingStream, StreamSettings
from stretto.termination import TerminationWatch

_log = logging.getLogger(__name__)

_REASON_LIMIT = 1000  # characters of a failure's reason that the controller hears


@dataclass(frozen=True, slots=True)
class SessionSettings:
    # Progress is sent at most this often by rank 0; the others only show that they advance.
    report_interval_s: float = 0.2
    other_ranks_report_interval_s: float = 1.0
    # After a SIGTERM, the controller has this long to end the generation; then the worker exits all the same.
    # Above it, torch's agent would send SIGKILL (30 s).
    drain_limit_s: float = 20.0
    # Having left, the worker waits this long for its agent to stop it. Must outlast an outage of the controller.
    stop_limit_s: float = 300.0
    # Before the process exits, what was said last has this long to reach the controller.
    flush_limit_s: float = 1.0
    stream: StreamSettings = field(default_factory=StreamSettings)

    def validate(self) -> None:
        """Raise ValueError unless every limit is positive."""
        self.stream.validate()
        for name in (f.name for f in fields(self) if f.name != "stream"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


class Session:
    """One worker process in one generation. Make it on the main thread, with `from_environment`.

    A training loop asks `leave_requested` (and `draining`) at each step boundary, lets all ranks agree, saves,
    says `left` and calls `wait_until_stopped`; it raises `error`, if there is one.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        identity: Identity,
        spec: types_pb2.JobSpec,
        settings: SessionSettings | None = None,
    ) -> None:
        self._settings = settings or SessionSettings()
        self._settings.validate()
        self._lock = threading.Lock()
        self._state = SessionState(identity, spec)
        self._error: Fatal | None = None
        self._terminated = threading.Event()
        self._news = threading.Event()
        self._closed = threading.Event()
        self._stream: ReconnectingStream[pb.TrainRequest, pb.TrainResponse] = ReconnectingStream(
            endpoints,
            lambda channel, requests: TrainingStub(channel).Train(requests),
            self._opening,
            self._hear,
            on_fatal=self._fail,
            settings=self._settings.stream,
            name="stretto-session",
        )
        self._watch = TerminationWatch(self._on_sigterm)

    @classmethod
    def from_environment(
        cls,
        spec: types_pb2.JobSpec,
        settings: SessionSettings | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Session | None:
        """The session of a worker that an agent of Stretto started, begun; None for any other process.

        Reads STRETTO_ENDPOINT, STRETTO_JOB, STRETTO_NODE, STRETTO_GENERATION, RANK and LOCAL_RANK, which the
        agent sets. From here on the process ends with its agent (STRETTO_AGENT_PID), and SIGTERM means drain or
        stop.
        """
        names = (ENDPOINT_VARIABLE, "STRETTO_JOB", "STRETTO_NODE", "STRETTO_GENERATION")
        if not all(environ.get(name) for name in names):
            return None
        identity = Identity(
            job=environ["STRETTO_JOB"],
            node_id=environ["STRETTO_NODE"],
            generation=_whole(environ, "STRETTO_GENERATION"),
            rank=_whole(environ, "RANK"),
            local_rank=_whole(environ, "LOCAL_RANK"),
        )
        if AGENT_PID_VARIABLE in environ:
            die_with_agent(_whole(environ, AGENT_PID_VARIABLE))
        session = cls(parse_endpoints(environ[ENDPOINT_VARIABLE]), identity, spec, settings)
        session.start()
        return session

    def start(self) -> None:
        """Connect, in the background, and take over SIGTERM."""
        self._watch.start()
        self._stream.start()
        threading.Thread(target=self._send_progress, name="stretto-progress", daemon=True).start()

    @property
    def generation(self) -> int:
        return self._state.identity.generation

    @property
    def rank(self) -> int:
        return self._state.identity.rank

    @property
    def scale(self) -> float | None:
        """S, as the controller owns it; None until it has answered."""
        return self._state.scale

    @property
    def connected(self) -> bool:
        """The controller has answered on the present connection."""
        return self._stream.connected

    @property
    def leave_requested(self) -> bool:
        """The controller asks this generation to leave after a step."""
        return self._state.leave_reason is not None

    @property
    def draining(self) -> bool:
        """SIGTERM came, and the controller has been told so."""
        return self._state.draining

    @property
    def fenced(self) -> str | None:
        """Why this generation is over and nothing of it counts any more; None while it does."""
        return self._state.fenced_reason

    @property
    def error(self) -> Fatal | None:
        """Why the controller refused this worker (another spec under the job's name, say), if it did."""
        return self._error

    def report(self, figures: StepFigures) -> None:
        """Tell of a committed step; the latest replaces earlier ones that were not sent yet. Never blocks."""
        with self._lock:
            progress = self._state.progress
            waiting = progress.unsent
            progress.commit(figures, pause_s=0.0 if progress.latest else process_age_s())
        if not waiting:
            self._news.set()

    def checkpoint_committed(
        self, step: int, tau: float, path: str, *, size_bytes: int = 0, duration_s: float = 0.0
    ) -> None:
        """Tell of a checkpoint that is whole."""
        committed = types_pb2.CheckpointCommitted(
            generation=self.generation,
            step=step,
            tau=tau,
            path=path,
            size_bytes=size_bytes,
            duration_s=duration_s,
        )
        with self._lock:
            message = self._state.checkpoint(committed)
        self._stream.send(message, latest_of="checkpoint")

    def checkpoint_failed(self, step: int, reason: str) -> None:
        """Tell of a save that came to nothing."""
        problem = types_pb2.CheckpointFailed(generation=self.generation, step=step, reason=reason[:_REASON_LIMIT])
        self._stream.send(pb.TrainRequest(checkpoint_failed=problem), latest_of="checkpoint_failed")

    def take_save_wish(self) -> bool:
        """Whether the controller has asked for a checkpoint since the last time."""
        wish, self._state.save_asked = self._state.save_asked, False
        return wish

    def left(self, step: int) -> None:
        """Say that this worker left its generation after `step`, its state being saved."""
        self._flush_progress()
        with self._lock:
            message = self._state.leave(step)
        self._stream.send(message)
        if self._terminated.is_set():
            self._exit(0)

    def finished(self, step: int, tau: float) -> None:
        """Say that the job's target is reached. The process may then end in its own time."""
        self._flush_progress()
        with self._lock:
            message = self._state.finish(step, tau)
        self._stream.send(message)

    def wait_until_stopped(self) -> None:
        """After `left`: wait for the agent to end this process. Raises Rejoin if it does not."""
        if self._terminated.wait(self._settings.stop_limit_s):
            # Another thread ends the process as soon as what was said last has been heard.
            self._closed.wait()
        raise Rejoin(
            f"generation {self.generation} was left, but the agent did not stop this worker within "
            f"{self._settings.stop_limit_s:g} s; ending so that it starts a new one"
        )

    def failed(self) -> None:
        """Training broke, for example because a collective failed; the caller raises when this returns.

        Where the agent is stopping this worker anyway, the process ends here, without noise.
        """
        if self._terminated.is_set():
            self._exit(1)

    def close(self) -> None:
        """End the conversation, after what was said has had its time to arrive. SIGTERM is given back."""
        self._watch.stop()
        self._flush_progress()
        self._closed.set()
        self._news.set()
        self._close_stream()

    def _opening(self) -> list[pb.TrainRequest]:
        with self._lock:
            return self._state.opening()

    def _hear(self, response: pb.TrainResponse) -> None:
        with self._lock:
            self._state.hear(response)
        self._exit_if_over()

    def _exit_if_over(self) -> None:
        """SIGTERM came earlier, and now the controller has said that there is nothing to wait for.

        Having left is another matter: who says so also ends the process, once the controller has heard it. This
        thread is the stream's own, and must not end it before.
        """
        if self._state.over and self._terminated.is_set():
            self._exit(0)

    def _fail(self, error: Fatal) -> None:
        with self._lock:
            self._state.refused = True
        if isinstance(error, NotFound):
            # The controller has lost its records. The agent will tell it of the job, and hear what to do.
            _log.warning("the controller does not know this worker: %s", error)
        else:
            self._error = error
        self._exit_if_over()

    def _send_progress(self) -> None:
        """Send the latest figures, no more often than the interval allows; runs on a thread of its own."""
        settings = self._settings
        interval_s = settings.report_interval_s if self.rank == 0 else settings.other_ranks_report_interval_s
        while not self._closed.is_set():
            self._news.wait()
            self._news.clear()
            self._flush_progress()
            self._closed.wait(interval_s)

    def _flush_progress(self) -> None:
        with self._lock:
            if not self._state.progress.unsent:
                return
            message = self._state.progress.message()
        self._stream.send(message, latest_of="progress")

    def _on_sigterm(self) -> None:
        """Runs on the watching thread, at most once."""
        with self._lock:
            answer = self._state.on_sigterm()
            message = self._state.drain() if answer is OnSigterm.DRAIN else None
            self._terminated.set()
        if message is None:
            self._exit(0)
            return
        _log.info("SIGTERM: asking the controller to drain this node")
        self._stream.send(message)
        if not self._closed.wait(self._settings.drain_limit_s):
            _log.warning("SIGTERM was %g s ago: ending now", self._settings.drain_limit_s)
            self._exit(143)

    def _close_stream(self) -> None:
        """Give a farewell the time for a connection; mere progress is worth no more than the one there is."""
        farewell = self._state.left is not None or self._state.finished is not None
        self._stream.close(self._settings.flush_limit_s if farewell or self._stream.connected else 0.0)

    def _exit(self, code: int) -> None:
        """End this process from any thread; the main one may be stuck in a collective."""
        self._flush_progress()
        self._close_stream()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _whole(environ: Mapping[str, str], name: str) -> int:
    try:
        value = int(environ[name])
    except (KeyError, ValueError):
        value = -1
    if value < 0:
        raise ValueError(
            f"{name} is {environ.get(name)!r} in the environment; allowed: a whole number of at least 0. "
            "It is set by torchrun or its rendezvous; start the script with `torchrun --rdzv-backend=stretto`"
        )
    return value
