"""A Training service in the test's own process that plays scripts and keeps what it heard."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import training_pb2_grpc as rpc

WAIT_S = 10.0
Script = Callable[[Iterator[pb.TrainRequest], Any], Iterator[pb.TrainResponse]]


def welcome_and_listen(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
    for request in requests:
        if request.HasField("hello"):
            yield pb.TrainResponse(welcome=pb.WorkerWelcome(scale=2.0))


class ScriptedTraining(rpc.TrainingServicer):
    """Plays one script per connection, the last one again and again; keeps what it heard."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.heard: queue.Queue[pb.TrainRequest] = queue.Queue()

    def Train(self, request_iterator: Any, context: Any) -> Iterator[pb.TrainResponse]:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        return script(self._listened(request_iterator), context)

    def _listened(self, requests: Iterator[pb.TrainRequest]) -> Iterator[pb.TrainRequest]:
        for request in requests:
            self.heard.put(request)
            yield request

    def next_heard(self) -> pb.TrainRequest:
        return self.heard.get(timeout=WAIT_S)


class Server:
    def __init__(self) -> None:
        self._server: grpc.Server | None = None
        self.port = 0

    def start(self, servicer: ScriptedTraining) -> None:
        self._server = grpc.server(ThreadPoolExecutor(8))
        rpc.add_TrainingServicer_to_server(servicer, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait(WAIT_S)
            self._server = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"
