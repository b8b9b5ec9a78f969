"""`stretto demo`, as a user starts it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stretto.client import JobsClient
from stretto.demo.processes import SupervisedController
from stretto.errors import Retry

pytestmark = pytest.mark.e2e

LIMIT_S = 400.0


class RunningDemo:
    """The command, with its files under `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._output = directory / "output.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("stretto")), "demo", "--plain"],
                stdout=output,
                stderr=output,
                env={**os.environ, "TMPDIR": str(directory)},
            )

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.05)

    def kill_controller(self) -> None:
        """kill -9, whichever controller serves now; False-safe while one is only starting."""
        for path in self._directory.glob("stretto-demo-*/controller.json"):
            os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)

    def steps_by_generation(self) -> list[int]:
        """As the table at the end has them."""
        rows = (line.split("│") for line in self.text.splitlines() if line.startswith("│"))
        return [int(cells[6]) for cells in rows if cells[1].strip()]

    def last_step(self) -> int:
        (step,) = re.findall(r"tau [\d.]+ reached at step (\d+)", self.text)
        return int(step)

    def leftovers(self) -> list[str]:
        """Command lines of processes that belong to this run; all have its directory in theirs."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self._directory) in command:
                found.append(command)
        return found

    def assert_gone(self) -> None:
        """The kernel may take a moment to end what was killed."""
        deadline_s = time.monotonic() + 10.0
        while self.leftovers() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert self.leftovers() == []


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[RunningDemo]:
    running = RunningDemo(tmp_path)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


@pytest.mark.timeout(LIMIT_S + 60)
def test_ends_well_although_the_controller_is_killed_at_random_moments(demo: RunningDemo) -> None:
    seed = int(os.environ.get("STRETTO_SEED", time.time_ns() % 1000))
    print(f"seed {seed} (STRETTO_SEED)")
    rng = random.Random(seed)
    demo.until(lambda: "One node starts the job." in demo.text)
    for mark in ("A second node comes", "Two more nodes come", "kill -9: the first node"):
        demo.until(lambda mark=mark: mark in demo.text)  # type: ignore[misc]  # bound at once
        time.sleep(rng.uniform(0.0, 8.0))
        demo.kill_controller()
    assert demo.process.wait(LIMIT_S) == 0, demo.text
    for words in ("the controller was gone", "node_lost: node-1", "node-2 drained", "succeeded", "exactly once: yes"):
        assert words in demo.text, demo.text
    assert sum(demo.steps_by_generation()) == demo.last_step(), demo.text
    demo.assert_gone()
    assert list(demo._directory.glob("stretto-demo-*")) == [], "its files are removed"


def test_a_controller_is_started_again_on_its_ports_unless_somebody_else_has_done_so(tmp_path: Path) -> None:
    controller = SupervisedController(tmp_path)
    try:
        assert not controller.ensure(), "it runs"
        host, _, port = controller.endpoint.rpartition(":")
        controller.child.kill()
        with socket.create_server((host, int(port))):
            assert not controller.ensure(), "another one serves"
        deadline_s = time.monotonic() + LIMIT_S
        while not controller.ensure():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        with JobsClient(controller.endpoint) as client:
            while True:
                try:
                    assert client.list() == []
                    break
                except Retry:
                    assert time.monotonic() < deadline_s
    finally:
        controller.child.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_leaves_nothing_running_when_it_is_stopped(demo: RunningDemo, number: signal.Signals, code: int) -> None:
    demo.until(lambda: "running: started with 1 node" in demo.text)
    assert len(demo.leftovers()) >= 3, "controller, agent, reference"
    demo.process.send_signal(number)
    assert demo.process.wait(60) == code, demo.text
    demo.assert_gone()
    if number is not signal.SIGKILL:
        assert list(demo._directory.glob("stretto-demo-*")) == [], "its files are removed"


def test_leaves_nothing_behind_when_it_is_stopped_twice_while_it_prepares(demo: RunningDemo) -> None:
    demo.until(lambda: bool(list(demo._directory.glob("stretto-demo-*/controller.log"))))
    demo.process.send_signal(signal.SIGTERM)
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(60) in (130, 143), demo.text
    demo.assert_gone()
    assert list(demo._directory.glob("stretto-demo-*")) == [], "its files are removed"
