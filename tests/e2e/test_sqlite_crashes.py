"""kill -9 of a controller on sqlite at each point between decision, save and send: nothing forgotten, nothing twice."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from e2e.scripts.crashing_controller import POINTS
from harness.controller import ControllerProcess
from harness.controllers import Agent, eventually
from stretto.client import JobsClient
from stretto.errors import Retry, StrettoError
from stretto_proto.v1 import types_pb2 as types

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).parent / "scripts" / "crashing_controller.py"
REGISTER = types.JobSpec(min_nodes=1, max_nodes=4000, mode=types.RECONFIGURE_MODE_RESTART)


class CrashingController(ControllerProcess):
    """A controller that dies at its next point."""

    point, count = next(iter(POINTS)), 10**9

    def command(self) -> list[str]:
        command = super().command()
        return [sys.executable, str(SCRIPT), self.point, str(self.count), *command[1:]]


class Asking:
    """A person who scales one job to ever more nodes, each time until it is acknowledged."""

    def __init__(self, client: JobsClient) -> None:
        self.acknowledged: list[int] = []
        self.error: StrettoError | None = None
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        for nodes in itertools.count(1):
            while True:
                try:
                    self._client.scale("register", nodes)
                    break
                except Retry:
                    time.sleep(0.02)
                except StrettoError as error:
                    self.error = error
                    return
            self.acknowledged.append(nodes)
            if self._stop.is_set():
                return


def test_a_controller_that_dies_between_any_two_steps_keeps_its_word(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    controller = CrashingController(tmp_path, STRETTO_LIMITS_RECOVERY_GRACE_S="1", STRETTO_LIMITS_SETTLE_S="0.1")
    with controller, Agent(controller.grpc) as agent, JobsClient(controller.grpc, timeout_s=5.0) as client:
        client.create("register", REGISTER)
        agent.comes_to(1)
        asking = Asking(client)
        for point in POINTS:
            controller.kill()
            controller.point, controller.count = point, rng.randint(2, 9)
            if point == "an agent comes":
                # There is one.
                controller.count = 1
            print(point, controller.count, len(asking.acknowledged), agent.generations, flush=True)
            # It may die before it is seen to serve.
            controller.launch()
            agent.ready()
            eventually(lambda: not controller.alive())
        controller.kill()
        controller.count = 10**9
        controller.start()
        agent.ready()
        newest = agent.generations[-1]
        eventually(lambda: agent.generations[-1] > newest)
        asking.end()
        assert asking.error is None, asking.error
        # The channel may still rest after its last failure.
        events = eventually(lambda: client.events("register"))
        scaled = [int(e.reason.split()[0]) for e in events if e.kind == "scale_requested"]
        assert scaled == asking.acknowledged
        assert client.get("register").desired_nodes == asking.acknowledged[-1]
        sequences = [event.sequence for name in ("register", "a") for event in client.events(name)]
        assert len(set(sequences)) == len(sequences), "a number was given to two events"
        numbers = [summary.generation.number for summary in client.generations("a")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert agent.generations == sorted(set(agent.generations))
        assert agent.generations[-1] == numbers[-1]
