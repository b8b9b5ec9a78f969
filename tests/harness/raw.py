"""Agents and workers that speak raw gRPC, message by message: the client's own logic is not under test here."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types
from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousStub
from stretto_proto.v1.training_pb2_grpc import TrainingStub

WAIT_S = 10.0
# Of a call: a token, for example.
Metadata = Sequence[tuple[str, str]]


class RawStream:
    """One bidirectional stream: `send` a message, `next` answer, `status` at its end."""

    def __init__(self, method: Callable[..., Any], metadata: Metadata = ()) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None), wait_for_ready=True, metadata=metadata)
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def send(self, message: Any) -> None:
        self._requests.put(message)

    def half_close(self) -> None:
        """Send nothing more."""
        self._requests.put(None)

    def next(self, timeout_s: float = WAIT_S) -> Any:
        """The next answer; None at the stream's end. Raises queue.Empty when none comes in time."""
        return self._answers.get(timeout=timeout_s)

    def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ended, once it has."""
        return self._call.code(), self._call.details()

    def cancel(self) -> None:
        self._call.cancel()

    def _receive(self) -> None:
        try:
            for answer in self._call:
                self._answers.put(answer)
        except grpc.RpcError:
            # `status` tells.
            pass
        self._answers.put(None)


class RawNode:
    """One agent. Each `connect` opens a new stream on a channel of its own."""

    def __init__(self, endpoint: str, job: str, node_id: str, *, metadata: Metadata = (), **spec: Any) -> None:
        self._metadata = metadata
        self.job = job
        self.node_id = node_id
        self.key = f"key-of-{node_id}-and-longer"
        self.spec = types.JobSpec(**{"min_nodes": 1, "max_nodes": 1, "mode": types.RECONFIGURE_MODE_RESTART, **spec})
        self.slots = 1
        self.request_id = 0
        self.generation = 0
        self._channel = grpc.insecure_channel(endpoint, [("grpc.use_local_subchannel_pool", 1)])
        self.stream: RawStream | None = None

    def __enter__(self) -> RawNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def open(self) -> RawStream:
        """A stream without a hello."""
        self.stream = RawStream(RendezvousStub(self._channel).Attend, self._metadata)
        return self.stream

    def hello(self, *, ready: bool = False, version: int = 1) -> rendezvous.AttendRequest:
        hello = rendezvous.NodeHello(
            protocol_version=version,
            job=self.job,
            node_id=self.node_id,
            node_key=self.key,
            slots=self.slots,
            address="127.0.0.1",
            spec=self.spec,
            generation=self.generation,
        )
        if ready:
            self.request_id += 1
            hello.ready.request_id = self.request_id
        return rendezvous.AttendRequest(hello=hello)

    def connect(self, *, ready: bool = False) -> rendezvous.NodeWelcome:
        """Say hello and take the welcome."""
        stream = self.open()
        stream.send(self.hello(ready=ready))
        answer = stream.next()
        assert answer is not None, f"the hello of {self.node_id} was refused: {stream.status()}"
        assert answer.WhichOneof("body") == "welcome", answer
        welcome: rendezvous.NodeWelcome = answer.welcome
        return welcome

    def say(self, **body: Any) -> None:
        assert self.stream is not None, "not connected"
        self.stream.send(rendezvous.AttendRequest(**body))

    def hears(self, kind: str) -> Any:
        """The next answer, which must be of that kind."""
        assert self.stream is not None, "not connected"
        return _body(self.stream, kind)

    def ready(self, **changes: Any) -> None:
        """Say that no worker runs, with a new request."""
        self.request_id += 1
        self.say(ready=rendezvous.NodeReady(request_id=self.request_id, **{"restarts_left": -1, **changes}))

    def assignment(self) -> types.Generation:
        """The next answer, which must be an assignment; the node then runs in that generation."""
        assert self.stream is not None, "not connected"
        answer = self.stream.next()
        assert answer is not None, f"the stream of {self.node_id} ended: {self.stream.status()}"
        assert answer.WhichOneof("body") == "assignment", answer
        generation: types.Generation = answer.assignment.generation
        self.generation = generation.number
        return generation


class RawWorker:
    """One training process."""

    def __init__(self, endpoint: str, job: str, node_id: str, rank: int, generation: int) -> None:
        self._channel = grpc.insecure_channel(endpoint, [("grpc.use_local_subchannel_pool", 1)])
        self._hello = training.WorkerHello(
            protocol_version=1, job=job, node_id=node_id, rank=rank, generation=generation
        )
        self.stream: RawStream | None = None

    def __enter__(self) -> RawWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def open(self, **spec: Any) -> RawStream:
        """Say hello, with what the worker knows of the spec."""
        self._hello.spec.CopyFrom(types.JobSpec(**spec))
        self.stream = RawStream(TrainingStub(self._channel).Train)
        self.stream.send(training.TrainRequest(hello=self._hello))
        return self.stream

    def connect(self, **spec: Any) -> training.TrainResponse:
        """Say hello and take the answer."""
        answer = self.open(**spec).next()
        assert answer is not None, "the hello was refused"
        response: training.TrainResponse = answer
        return response

    def say(self, **body: Any) -> None:
        assert self.stream is not None, "not connected"
        self.stream.send(training.TrainRequest(**body))


class RawLiveWorker:
    """One training process of in-process mode: it asks for its places itself, and keeps its last request in mind."""

    def __init__(self, endpoint: str, job: str, node_id: str, local_rank: int = 0, *, metadata: Metadata = ()) -> None:
        self._metadata = metadata
        self._channel = grpc.insecure_channel(endpoint, [("grpc.use_local_subchannel_pool", 1)])
        self.job, self.node_id, self.local_rank = job, node_id, local_rank
        self.request = training.WorkerReady(request_id=100, store_port=20000, preflight_port=30000)
        self.rank, self.generation = -1, 0
        self.stream: RawStream | None = None

    def __enter__(self) -> RawLiveWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def open(self, **changes: Any) -> RawStream:
        """Say hello: with the last request while it has no answer, with the place that it gave otherwise."""
        hello = training.WorkerHello(
            **{
                "protocol_version": 1,
                "job": self.job,
                "node_id": self.node_id,
                "local_rank": self.local_rank,
                "rank": self.rank,
                "generation": self.generation,
                "ready": None if self.generation else self.request,
                **changes,
            }
        )
        self.stream = RawStream(TrainingStub(self._channel).Train, self._metadata)
        self.stream.send(training.TrainRequest(hello=hello))
        return self.stream

    def connect(self, **changes: Any) -> training.WorkerWelcome:
        """Say hello and take the welcome."""
        welcome: training.WorkerWelcome = _body(self.open(**changes), "welcome")
        return welcome

    def say(self, **body: Any) -> None:
        assert self.stream is not None, "not connected"
        self.stream.send(training.TrainRequest(**body))

    def hears(self, kind: str) -> Any:
        """The next answer, which must be of that kind."""
        assert self.stream is not None, "not connected"
        return _body(self.stream, kind)

    def ask(self, step: int, *, failed: bool = False, version: int | None = None) -> None:
        """Leave the generation, with a state of that step, and ask for the next."""
        self.request.request_id += 1
        self.request.generation = self.generation
        self.request.version_generation = self.generation if version is None else version
        self.request.version_step = step
        self.request.failed = failed
        self.rank, self.generation = -1, 0
        self.say(ready=self.request)

    def place(self) -> training.WorkerAssignment:
        """The next answer, which must be the assignment that was asked for; the worker is in that generation then."""
        assignment: training.WorkerAssignment = self.hears("assignment")
        assert assignment.request_id == self.request.request_id
        self.rank, self.generation = assignment.rank, assignment.generation
        return assignment

    def progress(self, step: int, **figures: Any) -> None:
        self.say(progress=types.Progress(generation=self.generation, step=step, tau=float(step), **figures))

    def alive(self, step: int = 0, **pace: float) -> None:
        self.say(alive=training.WorkerAlive(generation=self.generation, step=step, **pace))


def _body(stream: RawStream, kind: str) -> Any:
    answer = stream.next()
    assert answer is not None, f"the stream ended instead of saying {kind}: {stream.status()}"
    assert answer.WhichOneof("body") == kind, answer
    return getattr(answer, kind)
