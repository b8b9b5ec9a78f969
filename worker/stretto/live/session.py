"""A live worker's conversation with the controller, and its way from one generation to the next."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2
from stretto_proto.v1.training_pb2_grpc import TrainingStub

from stretto.channel import ENDPOINT_VARIABLE, parse_endpoints
from stretto.checkpoint.background import Failed, Saved
from stretto.errors import Fatal
from stretto.group import BuildFailed, GroupLife, Member, Plan, Superseded, nccl
from stretto.live.generation import Generation
from stretto.live.pulse import Pulse
from stretto.live.settings import GivenUp, LiveSettings
from stretto.live.state import LiveIdentity, LiveState, OnSigterm
from stretto.live.step_clock import StepClock
from stretto.process import AGENT_PID_VARIABLE, die_with_agent, end_without_teardown
from stretto.progress_report import StepFigures
from stretto.rendezvous.sign_in import sign_in
from stretto.stream import ReconnectingStream
from stretto.termination import TerminationWatch

_log = logging.getLogger(__name__)

_REASON_LIMIT = 1000  # characters of a failure's reason that the controller hears


class LiveSession:
    """One live worker process. Make it on the main thread, with `from_environment`; once per process.

    `enter` gives one generation after the other. What the controller says meanwhile is heard on a thread of its own,
    which cuts a generation that is over: whatever the training thread waits for then ends within milliseconds.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        *,
        job: str,
        node_id: str,
        local_rank: int,
        address: str,
        spec: types_pb2.JobSpec,
        settings: LiveSettings | None = None,
        nccl_device: torch.device | None = None,
    ) -> None:
        self._settings = settings or LiveSettings()
        self._settings.validate()
        self._life = GroupLife(job, address, settings=self._settings.group, nccl_device=nccl_device)
        ports = self._life.serve()
        self.state = LiveState(
            LiveIdentity(job, node_id, local_rank, ports.store, ports.preflight),
            spec,
            first_request=random.SystemRandom().randrange(1, 2**40),
        )
        self.clock = StepClock()
        self._changed = threading.Condition()
        self._error: Fatal | None = None
        self._lost_after_ask = False
        self._terminated = self._saves = self._wants_save = False
        self._generation: Generation | None = None
        self._suspects: tuple[int, tuple[int, ...]] = (0, ())
        # Of a step that this rank has done, and that is not committed yet.
        self._pending: StepFigures | None = None
        self._on_commit: Callable[[int], None] = lambda step: None
        self._left_s = time.monotonic()
        self._closed = threading.Event()
        self._stream: ReconnectingStream[pb.TrainRequest, pb.TrainResponse] = ReconnectingStream(
            endpoints,
            lambda channel, requests: TrainingStub(channel).Train(requests),
            self._opening,
            self._hear,
            on_lost=self._lost,
            on_fatal=self._fail,
            settings=self._settings.stream,
            name="stretto-session",
        )
        self._pulse = Pulse(self.state, self._changed, self._stream, self._settings, self._present)
        self._watch = TerminationWatch(self._on_sigterm)

    @classmethod
    def from_environment(
        cls,
        spec: types_pb2.JobSpec,
        settings: LiveSettings | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> LiveSession | None:
        """The session of a worker that an agent of Stretto started in in-process mode, begun; None for any other.

        device: where its model is. backend: what tensors there go over: "nccl", "gloo", or None for nccl on GPUs and
        gloo elsewhere. The same on all workers. From here on the process ends with its agent (STRETTO_AGENT_PID), and
        SIGTERM means drain or stop.
        """
        names = (ENDPOINT_VARIABLE, "STRETTO_JOB", "STRETTO_NODE", "STRETTO_ADDRESS", "RANK")
        if environ.get("STRETTO_MODE") != "in-process" or not all(environ.get(name) for name in names):
            return None
        if AGENT_PID_VARIABLE in environ:
            die_with_agent(int(environ[AGENT_PID_VARIABLE]))
        sign_in(environ)
        session = cls(
            parse_endpoints(environ[ENDPOINT_VARIABLE]),
            job=environ["STRETTO_JOB"],
            node_id=environ["STRETTO_NODE"],
            # Its number on the node, until the first assignment: LOCAL_RANK is 0 under --virtual-local-rank.
            local_rank=int(environ["RANK"]),
            address=environ["STRETTO_ADDRESS"],
            spec=spec,
            settings=settings,
            nccl_device=nccl.device_for(backend, torch.device(device)),
        )
        session.start()
        return session

    def start(self) -> None:
        """Take over SIGTERM; the controller is called at the first `enter`, when this process is warm."""
        self._watch.start()

    def enter(self) -> Generation:
        """Wait for a place in the next generation and build its group with the others.

        Raises Fatal if the controller refuses this worker, GivenUp if the job ends while too few workers are left,
        and SystemExit(0) when this worker is to go. Waits for as long as the job does.
        """
        if not self._stream_started():
            self.ask(failed=False)
            self._stream.start()
            self._pulse.start(self.clock)
        if self._generation is not None:
            self._generation.close()
            self._generation = None
        while True:
            assignment = self._wait_for_place()
            plan = _plan(assignment)
            try:
                group = self._life.build(plan, cancelled=partial(self._is_over, plan.generation))
            except Superseded as news:
                _log.info("generation %d is given up: %s", plan.generation, news)
                self.ask(failed=True)
            except BuildFailed as failure:
                _log.info("generation %d was not formed: %s", plan.generation, failure)
                self.ask(failed=True, unreachable=failure.unreachable)
            else:
                generation = Generation(self, assignment, group)
                with self._changed:
                    self._generation = generation
                _log.info(
                    "generation %d: rank %d of %d (%s)",
                    generation.number,
                    generation.rank,
                    generation.world_size,
                    generation.reason,
                )
                return generation

    # -- for the generation
    # ----------------------------------------------------------------------------------------------

    def ask(self, *, failed: bool, unreachable: tuple[int, ...] = ()) -> None:
        """Leave the generation, if in one, and ask for the next."""
        self._pulse.flush()
        with self._changed:
            number, suspects = self._suspects
            if number and number == self.state.generation:
                unreachable = tuple(sorted({*unreachable, *suspects}))
            message = self.state.ask(failed=failed, unreachable=unreachable)
            self._lost_after_ask = False
            self._left_s = time.monotonic()
        self._stream.send(message)

    def synchronised(self, step: int) -> None:
        """This rank holds the generation's state."""
        with self._changed:
            self.state.synchronised(step)
        # Another rank's state may have replaced that step by another one of the same number.
        self._pending = None
        self._on_commit(step)

    def stepped(self, figures: StepFigures | None) -> None:
        """This rank has done a step; the one before it is committed."""
        self.committed()
        with self._changed:
            self.state.moved()
        self._pending = figures

    def committed(self) -> None:
        """All ranks have done the latest step."""
        with self._changed:
            self.state.reduced()
            step = self.state.committed_step
        pending, self._pending = self._pending, None
        if pending is not None:
            self._pulse.report(pending, self._left_s)
        self._on_commit(step)

    def on_commit(self, call: Callable[[int], None]) -> None:
        """Have this called, on the training thread, with the latest committed step."""
        self._on_commit = call

    def finish(self, tau: float) -> None:
        """Say that the job's target is reached."""
        self._pulse.flush()
        with self._changed:
            message = self.state.finish(tau)
        self._stream.send(message)

    def suspect(self, generation: int, ranks: tuple[int, ...]) -> None:
        """These ranks of the generation did not answer; said with the next request."""
        self._suspects = (generation, ranks)

    # -- for the training loop
    # -------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """SIGTERM came: this node is to leave at a step boundary."""
        return self.state.draining

    @property
    def connected(self) -> bool:
        """The controller has answered on the present connection."""
        return self._stream.connected

    @property
    def error(self) -> Fatal | None:
        """Why the controller refused this worker (another spec under the job's name, say), if it did."""
        return self._error

    def save_soon(self) -> None:
        """Have a checkpoint written at the next step that all ranks agree on."""
        self._wants_save = True

    @property
    def wants_save(self) -> bool:
        """`save_soon` was called, and the ranks have not agreed on it yet."""
        return self._wants_save

    def take_save_wish(self) -> bool:
        """Whether a checkpoint was asked for, here or by the controller, since the last time."""
        wish = self._wants_save or self.state.save_asked
        self._wants_save = self.state.save_asked = False
        return wish

    def checkpoint_committed(self, saved: Saved) -> None:
        """Tell the controller of a checkpoint that is whole."""
        committed = types_pb2.CheckpointCommitted(
            generation=saved.generation,
            step=saved.step,
            tau=saved.tau,
            path=saved.path,
            size_bytes=saved.size_bytes,
            duration_s=saved.duration_s,
        )
        with self._changed:
            message = self.state.checkpoint(committed)
        self._stream.send(message, latest_of="checkpoint")

    def checkpoint_failed(self, failed: Failed) -> None:
        """Tell the controller of a save that came to nothing."""
        problem = types_pb2.CheckpointFailed(
            generation=failed.generation, step=failed.step, reason=failed.reason[:_REASON_LIMIT]
        )
        self._stream.send(pb.TrainRequest(checkpoint_failed=problem), latest_of="checkpoint_failed")

    def close(self) -> None:
        """End the conversation, after what was said has had its time to arrive. SIGTERM is given back."""
        self._watch.stop()
        self._pulse.flush()
        self._closed.set()
        self._pulse.close()
        self._close_stream()
        if not self._life.close(self._settings.flush_limit_s):
            end_without_teardown()

    # -- threads
    # ---------------------------------------------------------------------------------------------------------

    def _stream_started(self) -> bool:
        return self.state.request is not None or self.state.generation > 0 or self._closed.is_set()

    def _present(self) -> Generation | None:
        return self._generation if self.state.generation else None

    def _is_over(self, generation: int) -> bool:
        return self.state.over(generation) is not None

    def _wait_for_place(self) -> pb.WorkerAssignment:
        with self._changed:
            if self.state.request is None and self.state.assignment is None:
                raise RuntimeError("this session has ended: a process takes part once")
            while (assignment := self.state.assignment) is None:
                if self._error is not None:
                    raise self._error
                if self.state.give_up_reason is not None:
                    raise GivenUp(self.state.give_up_reason)
                limit_s = None
                if self._terminated:
                    # Who keeps a state has the watching thread's limit for the controller's word: go, or save it first.
                    if not self.state.keeps_state:
                        limit_s = self._left_s + self._settings.farewell_limit_s - time.monotonic()
                        if self.state.request is not None and self.state.request.failed:
                            limit_s = 0.0
                    if self._lost_after_ask or (limit_s is not None and limit_s <= 0):
                        raise SystemExit(0)
                self._changed.wait(limit_s)
            return assignment

    def _opening(self) -> list[pb.TrainRequest]:
        with self._changed:
            return self.state.opening()

    def _hear(self, response: pb.TrainResponse) -> None:
        with self._changed:
            answers = self.state.hear(response)
            generation = self.state.generation
            over = self.state.over(generation) if generation else None
            self._changed.notify_all()
        for answer in answers:
            self._stream.send(answer)
        if over is not None:
            self._life.cut(generation, over)
        if response.HasField("welcome") or response.HasField("assignment"):
            self._pulse.wake()

    def _lost(self, reason: str) -> None:
        with self._changed:
            self._lost_after_ask = self.state.request is not None
            self._changed.notify_all()

    def _fail(self, error: Fatal) -> None:
        with self._changed:
            self.state.refused = True
            self._error = error
            generation = self._generation
            self._changed.notify_all()
        if generation is not None:
            self._life.cut(generation.number, str(error))

    def _on_sigterm(self) -> None:
        """Runs on the watching thread, at most once."""
        with self._changed:
            broken = self._generation is None or self._generation.broken
            giving_up = self.state.give_up_reason is not None
            drain = self.state.on_sigterm(broken=broken) is OnSigterm.DRAIN
            message = self.state.drain() if drain else None
            self._terminated = True
            # A connection that was lost before is no answer to this.
            self._lost_after_ask = False
            self._changed.notify_all()
        if message is not None:
            _log.info("SIGTERM: asking the controller to drain this node")
            self._stream.send(message)
        elif not giving_up:
            self._exit(0)
        if not self._closed.wait(self._settings.drain_limit_s):
            _log.warning("SIGTERM was %g s ago: ending now", self._settings.drain_limit_s)
            self._exit(143)

    def _close_stream(self) -> None:
        """Give a farewell the time for a connection; mere progress is worth no more than the one there is."""
        farewell = self.state.finished is not None
        self._stream.close(self._settings.flush_limit_s if farewell or self._stream.connected else 0.0)

    def _exit(self, code: int) -> None:
        """End this process from any thread; the main one may be stuck in a collective."""
        self._pulse.flush()
        self._close_stream()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _plan(assignment: pb.WorkerAssignment) -> Plan:
    members = tuple(
        Member(place.address, place.store_port, place.preflight_port, place.node_id) for place in assignment.places
    )
    return Plan(assignment.generation, assignment.rank, members)
