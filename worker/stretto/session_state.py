"""What a worker knows of its place in the job, and what it should say: the session's pure part.

No clock, no threads, no sockets: `session` calls these under its lock. One object lives as long as one worker
process in one generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

from stretto.progress_report import ProgressReport

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Which worker this is."""

    job: str
    node_id: str
    generation: int
    rank: int
    local_rank: int


class OnSigterm(Enum):
    """What the worker does about a SIGTERM."""

    # It has left, or nothing that it does counts any more.
    EXIT = "exit"
    # The node drains: train on until the step that all agree on, within a limit.
    DRAIN = "drain"


class SessionState:
    """Facts in, messages out. Attributes are for reading."""

    def __init__(self, identity: Identity, spec: types_pb2.JobSpec) -> None:
        self.identity = identity
        self.spec = spec
        # S, as the controller owns it; None until it has said so, or while it does not know the batch sizes.
        self.scale: float | None = None
        self.leave_reason: str | None = None
        self.fenced_reason: str | None = None
        # The controller wants a checkpoint at the next step boundary.
        self.save_asked = False
        # The controller ended the conversation for good.
        self.refused = False
        self.draining = False
        self.left: pb.WorkerLeft | None = None
        self.finished: pb.WorkerFinished | None = None
        self.progress = ProgressReport(identity.generation)
        self._checkpoint: types_pb2.CheckpointCommitted | None = None

    @property
    def over(self) -> bool:
        """Nothing that this worker does counts any more, by the controller's word."""
        return self.fenced_reason is not None or self.refused

    def opening(self) -> list[pb.TrainRequest]:
        """The first messages of a connection: hello, then all that the controller may have missed."""
        me = self.identity
        hello = pb.WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            job=me.job,
            node_id=me.node_id,
            rank=me.rank,
            local_rank=me.local_rank,
            generation=me.generation,
            spec=self.spec,
            step=self.progress.latest.step if self.progress.latest else 0,
        )
        messages = [pb.TrainRequest(hello=hello)]
        if self.progress.latest is not None:
            messages.append(self.progress.message())
        if self._checkpoint is not None:
            messages.append(pb.TrainRequest(checkpoint=self._checkpoint))
        if self.finished is not None:
            messages.append(pb.TrainRequest(finished=self.finished))
        elif self.left is not None:
            messages.append(pb.TrainRequest(left=self.left))
        elif self.draining:
            messages.append(self.drain())
        return messages

    def hear(self, response: pb.TrainResponse) -> None:
        """Take in a message of the controller. What is about another generation changes nothing."""
        if response.HasField("welcome"):
            self.scale = response.welcome.scale or None
        elif response.HasField("leave") and response.leave.generation == self.identity.generation:
            self.leave_reason = response.leave.reason or "the controller asked for it"
        elif response.HasField("save") and response.save.generation == self.identity.generation:
            self.save_asked = True
        elif response.HasField("fenced") and response.fenced.generation == self.identity.generation:
            self.fenced_reason = response.fenced.reason or "this generation is over"

    def leave(self, step: int) -> pb.TrainRequest:
        """This worker left its generation after `step`, its state being saved."""
        self.left = pb.WorkerLeft(generation=self.identity.generation, step=step)
        return pb.TrainRequest(left=self.left)

    def finish(self, step: int, tau: float) -> pb.TrainRequest:
        """The job's target is reached."""
        self.finished = pb.WorkerFinished(generation=self.identity.generation, step=step, tau=tau)
        return pb.TrainRequest(finished=self.finished)

    def drain(self) -> pb.TrainRequest:
        """This worker was asked to go."""
        self.draining = True
        return pb.TrainRequest(draining=pb.WorkerDraining(generation=self.identity.generation))

    def checkpoint(self, committed: types_pb2.CheckpointCommitted) -> pb.TrainRequest:
        """A checkpoint is whole, on durable storage."""
        self._checkpoint = committed
        return pb.TrainRequest(checkpoint=committed)

    def on_sigterm(self) -> OnSigterm:
        """An agent sends SIGTERM to stop workers, and when it is told to go itself; which of the two is meant?

        Where this worker has left, or is fenced, or was refused, it is being stopped. Otherwise it may be a drain:
        the controller knows, and answers a WorkerDraining with LeaveGeneration, or, if the generation is over,
        with WorkerFenced.
        """
        left = self.left is not None and self.finished is None
        return OnSigterm.EXIT if left or self.over else OnSigterm.DRAIN
