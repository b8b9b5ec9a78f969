"""Several real controllers on one etcd, and an agent that talks to whichever leads."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stretto.errors import Retry
from stretto.stream import ReconnectingStream, StreamSettings
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import types_pb2 as types
from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousStub

from harness.controller import ControllerProcess
from harness.etcd import EtcdCluster

WAIT_S = 60.0
SPEC = types.JobSpec(min_nodes=1, max_nodes=3, mode=types.RECONFIGURE_MODE_RESTART)


def eventually(check: Callable[[], Any]) -> Any:
    """What `check` gives, once it gives something; a controller that is away counts as not yet."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            found = check()
        except (OSError, Retry):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.02)


class Controllers:
    """Controllers that share one etcd. each_by: the endpoints by which each reaches it, if not the etcd's own."""

    def __init__(
        self, directory: Path, etcd: EtcdCluster, count: int, *, each_by: Sequence[str] = (), **environment: str
    ) -> None:
        self.etcd = etcd
        self.each = [
            ControllerProcess(
                directory / f"controller{number}",
                STRETTO_STORE="etcd",
                STRETTO_ETCD_ENDPOINTS=each_by[number] if each_by else etcd.endpoints,
                STRETTO_SERVICE_STOP_GRACE_S="0.2",
                **environment,
            )
            for number in range(count)
        ]
        for controller in self.each:
            controller.directory.mkdir()

    def __enter__(self) -> Controllers:
        for controller in self.each:
            controller.launch()
        for controller in self.each:
            controller.await_serving()
        return self

    def __exit__(self, *_: object) -> None:
        for controller in self.each:
            if controller.alive():
                controller.signal(signal.SIGCONT)
                controller.kill()

    @property
    def endpoints(self) -> str:
        return ",".join(controller.grpc for controller in self.each)

    def leader(self, *, but: ControllerProcess | None = None) -> ControllerProcess:
        """The controller that says it is ready; `but` is not asked, it may be frozen."""

        def found() -> ControllerProcess | None:
            asked = [each for each in self.each if each is not but and each.alive()]
            return next((each for each in asked if readiness(each)[0] == 200), None)

        leader: ControllerProcess = eventually(found)
        return leader


def readiness(controller: ControllerProcess, path: str = "/readyz") -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of a GET."""
    try:
        with urllib.request.urlopen(f"{controller.http}{path}", timeout=5) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), {name.lower(): value for name, value in error.headers.items()}


class Agent:
    """A node of job a on the worker library's own stream, which knows every controller; keeps what it is told."""

    def __init__(self, endpoints: str, node_id: str = "n0") -> None:
        self.node_id = node_id
        self.generations: list[int] = []
        self.welcomes: list[str] = []
        self.fatal: list[Exception] = []
        self._news = threading.Condition()
        self._request_id, self._generation, self._answered = 1, 0, False
        self._stream: ReconnectingStream[Any, Any] = ReconnectingStream(
            endpoints.split(","),
            lambda channel, requests: RendezvousStub(channel).Attend(requests),
            self._hello,
            self._on_message,
            on_fatal=self.fatal.append,
            settings=StreamSettings(max_backoff_s=0.5),
        )
        self._stream.start()
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._stream.close()

    def ready(self) -> None:
        """Its workers have ended: a new generation, please."""
        with self._news:
            self._request_id += 1
            self._answered = False
        self._stream.send(rendezvous.AttendRequest(ready=self._request()))

    def comes_to(self, generation: int) -> None:
        with self._news:
            came = self._news.wait_for(lambda: generation in self.generations or self.fatal, WAIT_S)
        assert came
        assert not self.fatal, self.fatal

    def connects_to(self, count: int) -> None:
        """Wait until that many connections have been welcomed."""
        eventually(lambda: len(self.welcomes) >= count)

    def _request(self) -> rendezvous.NodeReady:
        return rendezvous.NodeReady(request_id=self._request_id, generation=self._generation, restarts_left=-1)

    def _hello(self) -> list[rendezvous.AttendRequest]:
        hello = rendezvous.NodeHello(
            protocol_version=1,
            job="a",
            node_id=self.node_id,
            node_key=f"key-of-{self.node_id}-and-longer",
            slots=1,
            address="127.0.0.1",
            spec=SPEC,
            generation=self._generation if self._answered else 0,
        )
        if not self._answered:
            hello.ready.CopyFrom(self._request())
        return [rendezvous.AttendRequest(hello=hello)]

    def _on_message(self, message: rendezvous.AttendResponse) -> None:
        with self._news:
            if message.HasField("welcome"):
                self.welcomes.append(message.welcome.controller_id)
            elif message.HasField("assignment") and message.assignment.request_id == self._request_id:
                self._generation = message.assignment.generation.number
                self._answered = True
                self.generations.append(self._generation)
            self._news.notify_all()

    def _beat(self) -> None:
        while not self._stop.wait(0.5):
            beat = rendezvous.NodeHeartbeat(generation=self._generation)
            self._stream.send(rendezvous.AttendRequest(heartbeat=beat), latest_of="heartbeat")
