"""The reconnecting stream against a scripted gRPC server in this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from scripted_training import WAIT_S, Script, ScriptedTraining, Server, welcome_and_listen
from stretto.channel import parse_endpoints
from stretto.errors import Fatal, NotFound
from stretto.stream import ReconnectingStream, StreamSettings
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import training_pb2_grpc as rpc


class Client:
    """A stream whose callbacks fill queues; says `hello` with the state's step."""

    def __init__(self, *endpoints: str, **settings: Any) -> None:
        self.step = 0
        self.messages: queue.Queue[pb.TrainResponse] = queue.Queue()
        self.connected: queue.Queue[bool] = queue.Queue()
        self.lost: queue.Queue[str] = queue.Queue()
        self.fatal: queue.Queue[Fatal] = queue.Queue()
        self.stream: ReconnectingStream[pb.TrainRequest, pb.TrainResponse] = ReconnectingStream(
            endpoints,
            lambda channel, requests: rpc.TrainingStub(channel).Train(requests),
            self._hello,
            self.messages.put,
            on_connected=lambda: self.connected.put(True),
            on_lost=self.lost.put,
            on_fatal=self.fatal.put,
            settings=StreamSettings(max_backoff_s=0.1, **settings),
        )

    def _hello(self) -> list[pb.TrainRequest]:
        return [pb.TrainRequest(hello=pb.WorkerHello(job="job", step=self.step))]


def refuse(code: grpc.StatusCode, details: str) -> Script:
    def script(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        next(requests)
        context.abort(code, details)
        yield pb.TrainResponse()

    return script


def progress(step: int) -> pb.TrainRequest:
    request = pb.TrainRequest()
    request.progress.step = step
    return request


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def test_says_hello_first_and_then_what_is_sent(server: Server) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    client = Client(server.endpoint)
    client.stream.start()
    assert client.connected.get(timeout=WAIT_S)
    assert client.messages.get(timeout=WAIT_S).welcome.scale == 2.0
    assert client.stream.connected
    assert client.stream.send(progress(5))
    assert servicer.next_heard().hello.job == "job"
    assert servicer.next_heard().progress.step == 5
    assert client.stream.close(WAIT_S)
    assert client.stream.ended


def test_comes_back_after_the_server_died_and_restates_its_state(server: Server) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    client = Client(server.endpoint)
    client.stream.start()
    client.connected.get(timeout=WAIT_S)
    server.stop()
    assert "reached" in client.lost.get(timeout=WAIT_S)
    client.step = 7
    assert not client.stream.send(progress(6)), "nothing is queued while there is no connection"
    server.start(servicer)
    client.connected.get(timeout=WAIT_S)
    assert servicer.next_heard().hello.step == 0
    assert servicer.next_heard().hello.step == 7
    client.stream.close()


def test_waits_for_a_server_that_starts_later(server: Server) -> None:
    servicer = ScriptedTraining(welcome_and_listen)
    server.start(servicer)
    server.stop()
    client = Client(server.endpoint)
    client.stream.start()
    server.start(servicer)
    assert client.connected.get(timeout=WAIT_S)
    client.stream.close()


def test_tries_the_next_endpoint_when_one_answers_unavailable(server: Server) -> None:
    follower, leader = Server(), ScriptedTraining(welcome_and_listen)
    follower.start(ScriptedTraining(refuse(grpc.StatusCode.UNAVAILABLE, "the leader is elsewhere")))
    server.start(leader)
    client = Client(follower.endpoint, server.endpoint)
    client.stream.start()
    assert client.connected.get(timeout=WAIT_S)
    client.stream.close()
    follower.stop()


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.NOT_FOUND,
    ],
)
def test_ends_with_the_servers_words_on_a_status_that_another_attempt_would_meet_again(
    server: Server, code: grpc.StatusCode
) -> None:
    server.start(ScriptedTraining(refuse(code, "base_batch_size is 8 here, but the job runs with 16")))
    client = Client(server.endpoint)
    client.stream.start()
    error = client.fatal.get(timeout=WAIT_S)
    assert "the job runs with 16" in str(error)
    assert isinstance(error, NotFound) == (code is grpc.StatusCode.NOT_FOUND)
    assert client.stream.ended
    assert not client.stream.send(progress(1))


def test_a_callback_that_raises_ends_the_stream_with_its_error(server: Server) -> None:
    server.start(ScriptedTraining(welcome_and_listen))
    client = Client(server.endpoint)

    def fail() -> list[pb.TrainRequest]:
        raise RuntimeError("no state")

    client.stream._make_hello = fail
    client.stream.start()
    error = client.fatal.get(timeout=WAIT_S)
    assert isinstance(error.__cause__, RuntimeError)


def test_gives_up_a_connection_that_never_answers(server: Server) -> None:
    release = threading.Event()

    def mute(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        release.wait(WAIT_S)
        yield from ()

    server.start(ScriptedTraining(mute, welcome_and_listen))
    client = Client(server.endpoint, answer_timeout_s=0.1)
    client.stream.start()
    assert client.connected.get(timeout=WAIT_S)
    release.set()
    client.stream.close()


def test_waits_longer_for_a_server_that_is_late_for_everybody(server: Server) -> None:
    release = threading.Event()

    def late(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        next(requests)
        # Ten times as long as the first attempt waits.
        release.wait(1.0)
        yield pb.TrainResponse(welcome=pb.WorkerWelcome())

    server.start(ScriptedTraining(late))
    client = Client(server.endpoint, answer_timeout_s=0.1)
    client.stream.start()
    assert client.connected.get(timeout=WAIT_S)
    release.set()
    client.stream.close()


def test_keeps_only_the_latest_of_a_kind_and_the_order_of_the_rest(server: Server) -> None:
    hold = threading.Event()

    def slow(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        next(requests)
        yield pb.TrainResponse(welcome=pb.WorkerWelcome())
        hold.wait(WAIT_S)
        for _ in requests:
            pass

    servicer = ScriptedTraining(slow)
    server.start(servicer)
    client = Client(server.endpoint)
    client.stream.start()
    client.connected.get(timeout=WAIT_S)
    for step in range(10_000):
        assert client.stream.send(progress(step), latest_of="progress")
    client.stream.send(pb.TrainRequest(left=pb.WorkerLeft(step=9_999)))
    hold.set()
    assert client.stream.close(WAIT_S)
    heard = list(servicer.heard.queue)
    steps = [request.progress.step for request in heard if request.HasField("progress")]
    assert steps == sorted(steps)
    assert steps[-1] == 9_999
    assert heard[-1].HasField("left")


def test_an_overflowing_queue_breaks_the_connection_rather_than_blocking(server: Server) -> None:
    hold = threading.Event()

    def deaf(requests: Iterator[pb.TrainRequest], context: Any) -> Iterator[pb.TrainResponse]:
        yield pb.TrainResponse(welcome=pb.WorkerWelcome())
        hold.wait(WAIT_S)

    server.start(ScriptedTraining(deaf, welcome_and_listen))
    client = Client(server.endpoint, queue_limit=4)
    client.stream.start()
    client.connected.get(timeout=WAIT_S)
    while client.stream.send(_large()):
        pass
    client.lost.get(timeout=WAIT_S)
    client.connected.get(timeout=WAIT_S)
    hold.set()
    client.stream.close()


def _large() -> pb.TrainRequest:
    request = pb.TrainRequest()
    request.checkpoint.path = "x" * 1_000_000
    return request


def test_close_gives_up_after_its_limit_when_nobody_answers() -> None:
    client = Client("127.0.0.1:1")
    client.stream.start()
    assert not client.stream.close(0.05)
    assert client.stream.ended
    assert client.fatal.empty()


def test_close_may_be_called_from_a_callback(server: Server) -> None:
    server.start(ScriptedTraining(welcome_and_listen))
    client = Client(server.endpoint)
    closed = threading.Event()

    def close() -> None:
        client.stream.close(WAIT_S)
        closed.set()

    client.stream._on_connected = close
    client.stream.start()
    assert closed.wait(WAIT_S)


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("host", ("host:29400",)),
        ("host:1", ("host:1",)),
        ("a:1, b", ("a:1", "b:29400")),
        ("::1", ("[::1]:29400",)),
        ("[::1]:7", ("[::1]:7",)),
    ],
)
def test_reads_endpoints(text: str, endpoints: tuple[str, ...]) -> None:
    assert parse_endpoints(text) == endpoints


@pytest.mark.parametrize("text", ["", "host:", "host:0", "host:99999", ":1", "[::1", "[]:1", "a,,b", "host:x"])
def test_refuses_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_endpoints(text)
