"""The two services of long streams: Rendezvous for agents, Training for workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousServicer
from stretto_proto.v1.training_pb2_grpc import TrainingServicer

from stretto_controller.core.events import Event, StreamClosed, WorkerStreamClosed
from stretto_controller.runner import Runner
from stretto_controller.service.streams import Context, Conversation, Peer
from stretto_controller.sessions import StreamAction
from stretto_controller.settings import ServiceLimits
from stretto_controller.wire import inbound, outbound


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this controller says it is. controller_id differs after each start."""

    controller_id: str
    heartbeat_interval_s: float


class NodePeer(Peer):
    """An agent."""

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self._identity = identity
        self._node_id = ""

    def hello(self, message: rendezvous.AttendRequest) -> Event:
        self.job, event = inbound.node_hello(message, self.session_id)
        self._node_id = event.node_id
        return event

    def event(self, message: rendezvous.AttendRequest) -> Event:
        return inbound.node_event(message, self._node_id, self.session_id)

    def closed(self) -> StreamClosed:
        return StreamClosed(self._node_id, self.session_id)

    def greeting(self) -> rendezvous.AttendResponse:
        return outbound.node_welcome(self._identity.controller_id, self._identity.heartbeat_interval_s)

    def message(self, action: StreamAction) -> rendezvous.AttendResponse:
        return outbound.to_node(action)


class WorkerPeer(Peer):
    """A training process. The core's WelcomeWorker, or FenceWorker, is its greeting."""

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self._identity = identity

    def hello(self, message: training.TrainRequest) -> Event:
        self.job, event = inbound.worker_hello(message, self.session_id)
        return event

    def event(self, message: training.TrainRequest) -> Event:
        return inbound.worker_event(message, self.session_id)

    def closed(self) -> WorkerStreamClosed:
        return WorkerStreamClosed(self.session_id)

    def greeting(self) -> None:
        return None

    def message(self, action: StreamAction) -> training.TrainResponse:
        return outbound.to_worker(action, self._identity.controller_id, self._identity.heartbeat_interval_s)


class RendezvousService(RendezvousServicer):
    def __init__(self, runner: Runner, limits: ServiceLimits, identity: Identity) -> None:
        self._runner, self._limits, self._identity = runner, limits, identity

    # A coroutine, not a generator: gRPC cancels it where it stands, so that a stream's end is noted at once.
    async def Attend(  # type: ignore[override]  # the generated types know generators only
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> None:
        await Conversation(self._runner, self._limits, NodePeer(self._identity)).serve(request_iterator, context)


class TrainingService(TrainingServicer):
    def __init__(self, runner: Runner, limits: ServiceLimits, identity: Identity) -> None:
        self._runner, self._limits, self._identity = runner, limits, identity

    async def Train(  # type: ignore[override]  # as above
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> None:
        await Conversation(self._runner, self._limits, WorkerPeer(self._identity)).serve(request_iterator, context)
