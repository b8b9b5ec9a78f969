"""Streams to a server that is frozen, and that shuts down as soon as it goes on, as a leader does whose lease ended.

Without retries of gRPC's own all of them come back; with them, one in some hundreds of attempts never ended, and its
node was lost for good. How often depends on the machine, so this is a loop of STRETTO_SOAK_S seconds, 240 at most.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.etcd import free_ports
from stretto.stream import ReconnectingStream, StreamSettings
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import training_pb2_grpc as rpc

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]
SOAK_S = min(float(os.environ.get("STRETTO_SOAK_S", "240")), 240.0)
STREAMS = 24
# For one attempt that gets no answer, and the pause after it, many times over.
PATIENCE_S = 60.0


class Client:
    """A stream, and when it began its latest attempt."""

    def __init__(self, port: int) -> None:
        self.attempts = 0
        self.began_s = time.monotonic()
        self.stream: ReconnectingStream[pb.TrainRequest, pb.TrainResponse] = ReconnectingStream(
            [f"127.0.0.1:{port}"] * 2,
            lambda channel, requests: rpc.TrainingStub(channel).Train(requests),
            self._hello,
            lambda response: None,
            settings=StreamSettings(max_backoff_s=0.05),
        )
        self.stream.start()

    def _hello(self) -> list[pb.TrainRequest]:
        self.attempts += 1
        self.began_s = time.monotonic()
        return [pb.TrainRequest(hello=pb.WorkerHello(job="job"))]


def test_every_stream_comes_back_from_a_server_that_wakes_only_to_shut_down() -> None:
    (port,) = free_ports(1)
    script = Path(__file__).with_name("frozen_server.py")
    server = subprocess.Popen([sys.executable, str(script), str(port)])
    try:
        clients = [Client(port) for _ in range(STREAMS)]
        end_s = time.monotonic() + SOAK_S
        while time.monotonic() < end_s:
            time.sleep(random.uniform(0.3, 6.0))
            server.send_signal(signal.SIGCONT)
            assert server.poll() is None
            away_s = max(time.monotonic() - client.began_s for client in clients)
            assert away_s < PATIENCE_S, f"an attempt has not ended for {away_s:.0f} s"
        # An attempt that is stuck shows at the latest now: nobody else keeps a stream for so long.
        for client in clients:
            attempts = client.attempts
            while client.attempts == attempts:
                assert time.monotonic() < end_s + PATIENCE_S, "a stream makes no attempts any more"
                time.sleep(0.1)
                server.send_signal(signal.SIGCONT)
        print(f"{sum(client.attempts for client in clients)} attempts of {STREAMS} streams, none of them stuck")
    finally:
        server.kill()
        server.wait()
        for client in clients:
            client.stream.close()
