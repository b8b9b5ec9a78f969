"""What a handler leaves to the job's mode: the way in which workers meet a change of membership."""

from __future__ import annotations

from typing import Protocol

from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from torch.distributed.elastic.rendezvous import RendezvousInfo

from stretto.rendezvous.attendance import Answer
from stretto.rendezvous.store import ExitBarrier


class Mode(Protocol):
    """One node's part in a job of one mode. `close` ends it."""

    name: str
    reconfigure: types_pb2.ReconfigureMode.ValueType
    # Where peers reach this node.
    address: str

    @property
    def generation(self) -> int:
        """The generation that the workers run in, or last ran in; 0 if their agent does not know."""

    def complete(self, ready: pb.NodeReady) -> None:
        """Add to a request what peers must know of this node. No worker runs on it."""

    def enter(self, answer: Answer, slots: int, barrier: ExitBarrier) -> RendezvousInfo:
        """The controller has answered: what torch's agent needs to start its workers."""

    @property
    def environment(self) -> dict[str, str]:
        """What workers find in their environment, beyond what all workers find there. After `enter`."""

    def watch(self, *, stopping: bool) -> None:
        """Torch's agent looks at its workers. stopping: it is being told to stop them."""

    def kill_workers(self) -> None:
        """The workers no longer answer: end them. Any thread may call; returns at once."""

    def objection(self) -> str | None:
        """Why the workers did not end well although all exited with 0; None if they did."""

    def close(self) -> None:
        """The workers have ended, and none will start."""
