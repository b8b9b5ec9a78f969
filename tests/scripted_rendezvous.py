"""A Rendezvous server without a mind: the test says what it answers. It stands in for the controller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousServicer, add_RendezvousServicer_to_server

PATIENCE_S = 20.0


class Stream:
    """One connection of a node: what it said, and what is said to it."""

    def __init__(self) -> None:
        self.received: queue.Queue[pb.AttendRequest] = queue.Queue()
        self._to_send: queue.Queue[pb.AttendResponse | None] = queue.Queue()

    def expect(self, kind: str) -> pb.AttendRequest:
        """The next message of this kind; heartbeats in between are passed over, anything else is an error."""
        while True:
            message = self.received.get(timeout=PATIENCE_S)
            said = message.WhichOneof("body")
            if said == kind:
                return message
            assert said == "heartbeat", f"expected {kind}, got {said}: {message}"

    def welcome(self, heartbeat_interval_s: float = 1.0) -> None:
        self.send(pb.AttendResponse(welcome=pb.NodeWelcome(heartbeat_interval_s=heartbeat_interval_s)))

    def assign(
        self,
        request: pb.NodeReady,
        number: int,
        members: list[types_pb2.Member],
        *,
        at_fault: bool = False,
    ) -> None:
        generation = types_pb2.Generation(
            number=number, members=members, world_size=sum(m.slots for m in members), reason="scripted"
        )
        self.send(
            pb.AttendResponse(
                assignment=pb.NodeAssignment(
                    request_id=request.request_id,
                    generation=generation,
                    at_fault=at_fault,
                    node_count=len(members),
                )
            )
        )

    def start_workers(self, request: pb.NodeReady, *, at_fault: bool = False) -> None:
        answer = pb.StartWorkers(request_id=request.request_id, at_fault=at_fault)
        self.send(pb.AttendResponse(start_workers=answer))

    def stop_workers(self, number: int, *, force: bool = False) -> None:
        self.send(pb.AttendResponse(stop_workers=pb.StopWorkers(generation=number, reason="scripted", force=force)))

    def dismiss(self, *, success: bool, reason: str = "scripted") -> None:
        self.send(pb.AttendResponse(dismissed=pb.NodeDismissed(success=success, reason=reason)))

    def finish(self, number: int) -> None:
        self.send(pb.AttendResponse(generation_finished=pb.GenerationFinished(generation=number)))

    def send(self, response: pb.AttendResponse) -> None:
        self._to_send.put(response)

    def close(self) -> None:
        self._to_send.put(None)

    def responses(self) -> Iterator[pb.AttendResponse]:
        while (response := self._to_send.get()) is not None:
            yield response


class ScriptedRendezvous(RendezvousServicer):
    """Serves on a free port of 127.0.0.1 until `stop`."""

    def __init__(self) -> None:
        self._streams: queue.Queue[Stream] = queue.Queue()
        self._opened: list[Stream] = []
        # Set: every Hello is refused with this status.
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self._server = grpc.server(ThreadPoolExecutor(16))
        add_RendezvousServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"127.0.0.1:{self.port}"
        self._server.start()

    def Attend(
        self,
        request_iterator: Iterator[pb.AttendRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[pb.AttendResponse]:
        if self.refusal is not None:
            context.abort(*self.refusal)
        stream = Stream()
        self._opened.append(stream)

        def listen() -> None:
            try:
                for message in request_iterator:
                    stream.received.put(message)
            except grpc.RpcError:
                # The connection broke.
                pass
            stream.close()

        threading.Thread(target=listen, daemon=True).start()
        self._streams.put(stream)
        yield from stream.responses()

    def stream(self) -> Stream:
        """The next connection that some node opens."""
        return self._streams.get(timeout=PATIENCE_S)

    def stop(self) -> None:
        for stream in self._opened:
            stream.close()
        self._server.stop(None).wait()
