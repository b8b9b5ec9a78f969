"""What a live worker knows of its place in the job, of its state, and what it should say: pure.

No clock, no threads, no sockets, no torch: the shell (`live.session`) and the simulation call the same methods. One
object lives as long as the process, through all its generations:

    ask -> (hear an assignment) -> synchronised -> reduced, moved, reduced, moved, ... -> ask -> ...

`over` says that the generation has ended by the controller's word; the caller then gives up whatever it is doing and
asks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

from stretto.progress_report import ProgressReport, StepFigures

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class LiveIdentity:
    """Which worker this is, and where its peers reach it."""

    job: str
    node_id: str
    local_rank: int
    store_port: int
    preflight_port: int


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Of a worker's state: the generation in which it last moved or was synchronised, and its step."""

    generation: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class Leave:
    """The controller wants the workers to leave this generation after a step that they agree on."""

    reason: str
    # Nobody goes on with the state at once: write a checkpoint.
    save: bool


class OnSigterm(Enum):
    """What the worker does about a SIGTERM."""

    # It takes part in nothing, and has nothing to lose: end at once.
    EXIT = "exit"
    # The node drains: train on until the step that all agree on, or wait for the controller's word if in no generation.
    DRAIN = "drain"


class LiveState:
    """Facts in, messages out. Attributes are for reading."""

    def __init__(self, identity: LiveIdentity, spec: types_pb2.JobSpec, *, first_request: int = 1) -> None:
        """first_request: a number that another process in the same place has hardly used, so that its answers are not
        taken for this one's.
        """
        self.identity = identity
        self.spec = spec
        self.version = Version()
        # Every step up to this one counts: all ranks have done it.
        self.committed_step = 0
        # The latest generation that this worker was assigned to, if it is still in it.
        self.assignment: pb.WorkerAssignment | None = None
        # The question that waits for an answer.
        self.request: pb.WorkerReady | None = None
        self.leave: Leave | None = None
        # The controller wants a checkpoint at the next step boundary.
        self.save_asked = False
        self.give_up_reason: str | None = None
        # The controller ended the conversation for good.
        self.refused = False
        self.draining = False
        self.finished: pb.WorkerFinished | None = None
        self.heartbeat_interval_s = 0.0
        self.progress = ProgressReport(0)
        self._over_reason: str | None = None
        self._last_generation = 0
        self._next_request = first_request
        self._checkpoint: types_pb2.CheckpointCommitted | None = None

    @property
    def generation(self) -> int:
        """The generation that this worker is in; 0 if none."""
        return self.assignment.generation if self.assignment else 0

    @property
    def scale(self) -> float | None:
        """S of this generation, as the controller owns it; None while it does not know the batch sizes."""
        return (self.assignment.scale or None) if self.assignment else None

    def over(self, generation: int) -> str | None:
        """Why this generation has ended, by the controller's word; None while it goes on."""
        if generation == self.generation:
            return self._over_reason
        return f"generation {generation} is over"

    def ask(self, *, failed: bool = False, unreachable: Sequence[int] = ()) -> pb.TrainRequest:
        """Leave the generation, if in one, and ask for the next. failed: it broke under this worker."""
        self._last_generation = self.generation or self._last_generation
        self.request = pb.WorkerReady(
            request_id=self._next_request,
            generation=self._last_generation,
            version_generation=self.version.generation,
            version_step=self.version.step,
            failed=failed,
            unreachable=sorted(unreachable),
            store_port=self.identity.store_port,
            preflight_port=self.identity.preflight_port,
        )
        self._next_request += 1
        self.assignment = self.leave = self._over_reason = None
        return pb.TrainRequest(ready=self.request)

    def synchronised(self, step: int) -> None:
        """This worker holds the generation's state, that of `step`, and so does every rank that goes on."""
        assert self.assignment is not None, "state is synchronised inside a generation"
        self.version = Version(self.generation, step)
        self.committed_step = step

    def reduced(self) -> None:
        """A collective of all ranks has succeeded: each of them has done the step that this worker did last."""
        assert self.version.generation == self.generation, "no step before the state is synchronised"
        self.committed_step = self.version.step

    def moved(self) -> None:
        """This worker's state made one more step, after the collective of that step had succeeded."""
        assert self.version.generation == self.generation, "no step before the state is synchronised"
        self.version = Version(self.generation, self.version.step + 1)

    def hear(self, response: pb.TrainResponse) -> list[pb.TrainRequest]:
        """Take in a message, and return what must be said at once. Late, repeated and foreign ones change nothing."""
        kind = response.WhichOneof("body")
        if kind == "welcome":
            self.heartbeat_interval_s = response.welcome.heartbeat_interval_s
        elif kind == "assignment":
            self._take(response.assignment)
        elif kind == "leave" and response.leave.generation == self.generation:
            self.leave = Leave(response.leave.reason or "the controller asked for it", response.leave.save)
        elif kind == "save" and response.save.generation == self.generation:
            self.save_asked = True
        elif kind == "cut" and response.cut.generation == self.generation:
            self._over_reason = response.cut.reason or "the controller cut this generation"
            return [self.alive()]
        elif kind == "fenced" and response.fenced.generation == self.generation:
            self._over_reason = response.fenced.reason or "this generation is over"
        elif kind == "save_and_exit":
            self.give_up_reason = response.save_and_exit.reason or "the job gives up"
        return []

    def opening(self) -> list[pb.TrainRequest]:
        """The first messages of a connection: hello, then all that the controller may have missed."""
        me = self.identity
        hello = pb.WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            job=me.job,
            node_id=me.node_id,
            rank=self.assignment.rank if self.assignment else -1,
            local_rank=me.local_rank,
            generation=self.generation,
            spec=self.spec,
            step=self.version.step,
            ready=self.request,
        )
        messages = [pb.TrainRequest(hello=hello)]
        if self.progress.latest is not None and self.progress.generation == self.generation:
            messages.append(self.progress.message())
        if self._checkpoint is not None:
            messages.append(pb.TrainRequest(checkpoint=self._checkpoint))
        if self.finished is not None:
            messages.append(pb.TrainRequest(finished=self.finished))
        elif self.draining:
            messages.append(self.drain())
        return messages

    def alive(self, *, working_s: float = 0.0, waiting_s: float = 0.0, median_step_s: float = 0.0) -> pb.TrainRequest:
        """A sign of life. working_s, waiting_s: at the step under way, on its own part and for the others."""
        return pb.TrainRequest(
            alive=pb.WorkerAlive(
                generation=self.generation,
                step=self.version.step + 1,
                working_s=working_s,
                waiting_s=waiting_s,
                median_step_s=median_step_s,
            )
        )

    def commit(self, figures: StepFigures, *, pause_s: float) -> None:
        """Count a step that is committed, to be reported."""
        if self.progress.generation != self.generation:
            self.progress.begin(self.generation)
        self.progress.commit(figures, pause_s=pause_s)

    def finish(self, tau: float) -> pb.TrainRequest:
        """The job's target is reached, on every rank."""
        self.finished = pb.WorkerFinished(generation=self.generation, step=self.committed_step, tau=tau)
        return pb.TrainRequest(finished=self.finished)

    def drain(self) -> pb.TrainRequest:
        """This worker was asked to go."""
        self.draining = True
        return pb.TrainRequest(draining=pb.WorkerDraining(generation=self.generation))

    def checkpoint(self, committed: types_pb2.CheckpointCommitted) -> pb.TrainRequest:
        """A checkpoint is whole, on durable storage."""
        self._checkpoint = committed
        return pb.TrainRequest(checkpoint=committed)

    @property
    def keeps_state(self) -> bool:
        """There are steps in this worker's memory. Whether anybody else has them only the controller knows."""
        return self.version.step > 0

    def on_sigterm(self, *, broken: bool) -> OnSigterm:
        """An agent sends SIGTERM when it ends, and when it stops workers because one of its others failed.

        broken: the generation's group does not work any more, or there is none. Who then keeps a state may be the last
        that does: the controller says whether to save it.
        """
        in_work = not broken and self.assignment is not None and self._over_reason is None
        return OnSigterm.DRAIN if (in_work or self.keeps_state) and not self.refused else OnSigterm.EXIT

    def _take(self, assignment: pb.WorkerAssignment) -> None:
        if self.request is None or assignment.request_id != self.request.request_id:
            return
        self.request = None
        self.assignment = assignment
