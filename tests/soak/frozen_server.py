"""A server that freezes itself again and again, and shuts down as soon as it goes on: python frozen_server.py PORT."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1.training_pb2_grpc import TrainingServicer, add_TrainingServicer_to_server


class Training(TrainingServicer):
    """Welcomes every second stream, and sends the others away at once, so that somebody always connects."""

    async def Train(  # type: ignore[override]  # a coroutine, as the controller's
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> None:
        async for request in request_iterator:
            if request.HasField("hello"):
                if random.random() < 0.5:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "ask another one")
                await context.write(pb.TrainResponse(welcome=pb.WorkerWelcome()))


async def serve(port: int) -> None:
    while True:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_TrainingServicer_to_server(Training(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await asyncio.sleep(random.uniform(0.02, 0.3))
        os.kill(os.getpid(), signal.SIGSTOP)
        await server.stop(random.choice([0.0, 0.05, 0.2, None]))


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
