"""`stretto top`: what it shows at 80 columns, what keys do, and all of it through a real pseudo-terminal."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.controller import STRETTO, ControllerProcess
from harness.raw_job import PATIENT_LIMITS, RawJob
from harness.terminal import PATIENCE_S, Terminal
from rich.console import Console
from stretto.top.keys import split
from stretto.top.view import Picture, draw, duration, ordered, sparkline
from stretto_proto.v1 import jobs_pb2
from stretto_proto.v1 import types_pb2 as types


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
            reason="3 nodes: a fourth node would bring 31 % of what the first does",
            sizes=[
                types.SizePrediction(nodes=1, progress_rate=100.0, seen=True),
                types.SizePrediction(nodes=3, progress_rate=241.6),
            ],
        )
    )
    lines = text(Picture(jobs=[shown], selected="a")).splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("a ")).split()[3] == "3"
    assert any("3 nodes: a fourth node would bring 31 %" in line for line in lines)
    assert any("1: 100  3: 242?" in line for line in lines)


def test_many_jobs_and_nodes_leave_room_for_the_rest() -> None:
    jobs = [job(f"job-{number:03}") for number in range(100)]
    for number in range(50):
        jobs[60].nodes.add(node_id=f"host-{number + 2}", state="active", slots=1, connected=True)
    event = jobs_pb2.Event(time_s=1e9, kind="node_lost", reason="host-7 is lost")
    console = Console(width=80, force_terminal=False)
    picture = Picture(jobs=jobs, selected="job-060", events=[event] * 9, told="job-060: done")
    for height in (24, 30, 50):
        with console.capture() as captured:
            console.print(draw(picture, 80, height))
        lines = captured.get().splitlines()
        assert len(lines) <= height - 2, "two are for the keys"
        assert any(line.startswith("job-060 ") for line in lines)
        assert any(line.startswith("jobs ") and line.endswith(" of 100") for line in lines)
        assert sum("node lost: host-7" in line for line in lines) == 5
        assert "host-2" in captured.get()
        assert lines[-1] == "job-060: done"
    assert len(text(Picture(jobs=jobs)).splitlines()) == 101, "without a screen there is no limit"


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


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path, **PATIENT_LIMITS) as controller:
        yield controller


def _says_that_nobody_answers(text: str) -> bool:
    return "did not answer" in text or "unavailable" in text.lower() or "reach" in text


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
            terminal.until(_says_that_nobody_answers)
            controller.start()
            terminal.until(lambda text: "paused" in text and not _says_that_nobody_answers(text))
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
