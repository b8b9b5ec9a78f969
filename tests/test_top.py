"""`stretto top`: what it shows at 80 columns, what keys do, and all of it through a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyte
import pytest
from harness.controller import STRETTO, ControllerProcess
from harness.raw_job import PATIENT_LIMITS, RawJob
from rich.console import Console
from stretto.top.keys import split
from stretto.top.view import Picture, draw, duration, ordered, sparkline
from stretto_proto.v1 import jobs_pb2
from stretto_proto.v1 import types_pb2 as types

PATIENCE_S = 60.0


def job(name: str, phase: str = "running", **fields: float) -> jobs_pb2.Job:
    return jobs_pb2.Job(
        name=name,
        phase=phase,
        reason="started with 2 nodes",
        desired_nodes=2,
        spec=types.JobSpec(min_nodes=1, max_nodes=4, target_tau=100000),
        generation=types.Generation(number=3, scale=2.0),
        progress=types.Progress(generation=3, step=7, tau=12345.0, gain=1.75, loss=0.5, effective_lr=[0.17]),
        remaining_s=fields.get("remaining_s", 42.0),
        progress_rate=fields.get("progress_rate", 123.4),
        nodes=[jobs_pb2.Node(node_id="host-1", state="active", slots=2, connected=True, silent_s=0.2)],
    )


def text(picture: Picture, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(draw(picture, width))
    return captured.get()


def test_everything_fits_into_80_columns() -> None:
    jobs = [job("a"), job("a-name-of-sixty-three-characters-which-is-the-longest-that-a-label", "reconfiguring")]
    shown = text(Picture(jobs=jobs, rates={"a": [1.0, 2.0, 3.0]}, selected="a"))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("a "))
    for part in ("running", "1/2", "1.75", "12345/100000", "42 s", "123.4", "█"):
        assert part in row, part
    assert "host-1" in shown


def test_the_best_size_is_told_with_its_reason_and_the_rates_expected() -> None:
    shown = job("a")
    shown.recommendation.CopyFrom(
        types.Recommendation(
            nodes=3,
            reason="a fourth node would bring 31 % of what the first does",
            sizes=[
                types.SizePrediction(nodes=1, progress_rate=100.0, seen=True),
                types.SizePrediction(nodes=3, progress_rate=241.6),
            ],
        )
    )
    lines = text(Picture(jobs=[shown], selected="a")).splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("a ")).split()[3] == "3"
    assert any("best 3: a fourth node would bring 31 %" in line for line in lines)
    assert any("1: 100  3: 242?" in line for line in lines)


def test_markup_in_names_and_reasons_is_text() -> None:
    evil = job("a")
    evil.reason = "[red]boo[/] [link=x]"
    assert "[red]boo[/] [link=x]" in text(Picture(jobs=[evil], selected="a"))


def test_no_jobs_are_said_to_be_none() -> None:
    assert "no jobs" in text(Picture())


def test_a_sparkline_shows_the_latest_values_and_gaps() -> None:
    assert sparkline([9.0, 0.0, 4.0, 8.0], 3) == "▁▅█"
    assert sparkline([math.nan, 1.0], 5) == " █"
    assert sparkline([0.0, 0.0], 5) == "▁▁"
    assert sparkline([], 5) == ""


def test_jobs_are_sorted_by_each_column_and_unknown_times_come_last() -> None:
    jobs = [job("c", remaining_s=-1), job("a", "failed", remaining_s=9), job("b", remaining_s=1, progress_rate=999)]
    names = {sort: [found.name for found in ordered(jobs, sort)] for sort in ("name", "phase", "left", "rate")}
    assert names == {
        "name": ["a", "b", "c"],
        "phase": ["a", "b", "c"],
        "left": ["b", "a", "c"],
        "rate": ["b", "a", "c"],
    }


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "-"), (0.4, "0 s"), (99, "99 s"), (120, "2 min"), (7200, "2 h"), (400_000, "5 d")],
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_keys_that_arrive_together_are_told_apart() -> None:
    assert split("s\x1b[A\x1b[Bq") == ["s", "up", "down", "q"]
    assert split("\x1b") == ["no"]
    assert split("y\r") == ["y", "enter"]


class Terminal:
    """A command on a pseudo-terminal of 80 x 24, and what a person would see there."""

    def __init__(self, *command: str) -> None:
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        # Not pty.fork: this process has gRPC's threads, and the child of a fork would crash in them.
        self._master, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment["TERM"] = "xterm-256color"
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    @property
    def text(self) -> str:
        return "\n".join(self._screen.display)

    def until(self, condition: Callable[[str], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition(self.text):
            assert time.monotonic() < deadline_s, f"it did not show:\n{self.text}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self._stream.feed(os.read(self._master, 65536))
                except OSError:
                    assert condition(self.text), f"it ended:\n{self.text}"

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def exit_code(self) -> int:
        """Of the command, which is about to end; what it still says is read meanwhile."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self._process.poll() is None:
            assert time.monotonic() < deadline_s, self.text
            if select.select([self._master], [], [], 0.05)[0]:
                with suppress(OSError):
                    self._stream.feed(os.read(self._master, 65536))
        return self._process.returncode

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path, **PATIENT_LIMITS) as controller:
        yield controller


@pytest.mark.e2e
def test_a_job_is_watched_and_steered_through_a_terminal(controller: ControllerProcess) -> None:
    with RawJob(controller) as job:
        job.pair()
        terminal = Terminal(STRETTO, "top", "--endpoint", controller.grpc, "--interval", "0.2")
        try:
            terminal.until(lambda text: "running" in text and "q quit" in text)
            terminal.type("s")
            terminal.until(lambda text: "sort: phase" in text)
            terminal.type("c")
            terminal.until(lambda text: "Write a checkpoint of a" in text)
            terminal.type("n")
            terminal.until(lambda text: "nothing was changed" in text)
            terminal.type("-")
            terminal.until(lambda text: "Scale a from 2 to 1 nodes? y/n" in text)
            terminal.type("n")
            terminal.until(lambda text: "nothing was changed" in text)
            assert job.shown()["desired_nodes"] == 2
            terminal.type("-")
            terminal.until(lambda text: "to 1 nodes? y/n" in text)
            terminal.type("y")
            terminal.until(lambda text: "/1" in text)
            assert job.shown()["desired_nodes"] == 1
            terminal.type("p")
            terminal.until(lambda text: "Pause a?" in text)
            terminal.type("y")
            terminal.until(lambda text: "Pause a?" not in text)
            assert job.shown()["paused"]

            # A controller that is away is said to be, and found again.
            controller.kill()
            terminal.until(lambda text: "did not answer" in text or "unavailable" in text.lower() or "reach" in text)
            terminal.type("q")
            assert terminal.exit_code() == 0
        finally:
            terminal.close()


@pytest.mark.e2e
def test_once_prints_one_picture_and_ends(controller: ControllerProcess) -> None:
    with RawJob(controller) as job:
        job.pair()
        done = subprocess.run(
            [STRETTO, "top", "--once", "--endpoint", controller.grpc],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, "COLUMNS": "80"},
        )
    assert done.returncode == 0, done.stderr
    assert "running" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.e2e
def test_without_a_terminal_it_says_what_to_do(controller: ControllerProcess) -> None:
    done = subprocess.run(
        [STRETTO, "top", "--endpoint", controller.grpc], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2
    assert "--once" in done.stderr
