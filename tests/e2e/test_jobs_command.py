"""`stretto jobs` as a person has it, on a terminal of 80 columns, and as a script has it, piped."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.controller import STRETTO, ControllerProcess
from harness.raw_job import PATIENT_LIMITS, RawJob, eventually
from harness.terminal import PATIENCE_S, Terminal
from stretto.commands.jobs import app
from typer.testing import CliRunner

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    settings = {**PATIENT_LIMITS, "STRETTO_SERVICE_REVIEW_INTERVAL_S": "0.1", "STRETTO_LIMITS_RESIZE_CONFIRM_S": "0.1"}
    with ControllerProcess(tmp_path_factory.mktemp("controller"), **settings) as controller:
        yield controller


@pytest.fixture(scope="module")
def job(controller: ControllerProcess) -> Iterator[RawJob]:
    """Two nodes that train with a gradient of much noise, so that a third would pay."""
    with RawJob(controller, target_tau=1_000_000, max_nodes=3) as job:
        workers = job.pair()
        for step in (20, 40):
            workers[0].progress(step, gain=1.9, scale=2.0, variance=19.0, sqr_norm=1.0)
            before = time.monotonic()
            eventually(lambda step=step: (job.shown()["progress"] or {}).get("step") == step)  # type: ignore[misc]
            # At least one review between the two.
            eventually(lambda before=before: time.monotonic() - before > 0.5)  # type: ignore[misc]
        eventually(lambda: (job.shown()["recommendation"] or {}).get("nodes") == 3)
        yield job


def piped(controller: ControllerProcess, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [STRETTO, "jobs", *arguments, "--endpoint", controller.grpc],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k != "COLUMNS"}, **environment},
    )


def as_json(controller: ControllerProcess, *arguments: str) -> Any:
    done = piped(controller, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What each shows in both worlds.
LOOKS = {
    ("list",): ["job", "a", "running", "2/2 (best 3)", "1.90"],
    ("show", "a"): ["running", "step 40", "autoscale recommend, goal progress, floor 50%", "n0", "active"],
    ("autoscale", "a"): ["recommend, goal progress", "3 nodes instead of 2", "nodes", "best", "seen", " ms"],
    ("events", "a"): ["node_joined", "size_recommended", "3 nodes instead of 2"],
    ("generations", "a"): ["paused", "1", "2"],
}


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_a_look_fits_a_terminal_and_a_pipe(
    controller: ControllerProcess, job: RawJob, arguments: tuple[str, ...]
) -> None:
    terminal = Terminal(STRETTO, "jobs", *arguments, "--endpoint", controller.grpc)
    try:
        assert terminal.exit_code() == 0
        told = " ".join(terminal.text.split())
        for part in LOOKS[arguments]:
            assert part in told, terminal.text
    finally:
        terminal.close()
    done = piped(controller, *arguments)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    for part in LOOKS[arguments]:
        assert part in " ".join(done.stdout.split()), done.stdout
    assert as_json(controller, *arguments)


def test_json_has_every_prediction(controller: ControllerProcess, job: RawJob) -> None:
    shown = as_json(controller, "autoscale", "a")
    sizes = {size["nodes"]: size for size in shown["recommendation"]["sizes"]}
    assert set(sizes) == {1, 2, 3}
    assert (sizes[2]["seen"], sizes[3]["seen"]) == (True, False)
    assert sizes[3]["gain"] == pytest.approx(20 / (19 / 3 + 1))
    over_http = controller.get("/api/v1/jobs/a")["recommendation"]["sizes"]
    assert [size["progress_rate"] for size in over_http] == [sizes[n]["progress_rate"] for n in (1, 2, 3)]


def test_watching_goes_on_until_ctrl_c(controller: ControllerProcess, job: RawJob) -> None:
    terminal = Terminal(STRETTO, "jobs", "list", "--watch", "--interval", "0.1", "--endpoint", controller.grpc)
    try:
        terminal.until(lambda text: "running" in text)
        assert terminal.text.count("running") == 1, "it is drawn in place"
        os.killpg(terminal.pid, 2)
        assert terminal.exit_code() == 0
    finally:
        terminal.close()


def test_settings_are_set_and_wrong_ones_refused(controller: ControllerProcess, job: RawJob) -> None:
    shown = as_json(controller, "autoscale", "a", "--floor", "0.4", "--priority", "0", "--deadline", "+8h")
    assert shown["autoscale"]["efficiency_floor"] == 0.4
    assert shown["autoscale"]["goal"] == "AUTOSCALE_GOAL_DEADLINE"
    assert shown["autoscale"]["deadline_s"] == pytest.approx(time.time() + 8 * 3600, abs=600)
    shown = as_json(controller, "autoscale", "a", "recommend", "--goal", "progress", "--floor", "0.5")
    assert shown["autoscale"]["goal"] == "AUTOSCALE_GOAL_PROGRESS"
    refused = piped(controller, "autoscale", "a", "--floor", "7")
    assert (refused.returncode, "efficiency_floor is 7" in refused.stderr) == (1, True)
    for bad in (["--floor", "-1"], ["--deadline", "soon"], ["sometimes"], ["--goal", "fame"]):
        assert piped(controller, "autoscale", "a", *bad).returncode == 2, bad


@pytest.mark.parametrize(
    "arguments",
    [("show", "b"), ("scale", "b", "2"), ("pause", "b"), ("resume", "b"), ("checkpoint", "b"), ("delete", "b"),
     ("drain", "a", "nobody"), ("events", "b", "--follow"), ("autoscale", "b", "act"), ("generations", "b")],
    ids=" ".join,
)  # fmt: skip
def test_who_is_not_there_is_code_3(controller: ControllerProcess, job: RawJob, arguments: tuple[str, ...]) -> None:
    # In this process, as they are many; that codes reach the shell, the others show.
    done = CliRunner().invoke(app, [*arguments, "--endpoint", controller.grpc])
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ")


def test_no_controller_is_code_1_and_nonsense_code_2() -> None:
    done = subprocess.run([STRETTO, "jobs", "list", "--endpoint", "127.0.0.1:1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is `stretto controller` running?" in done.stderr
    assert subprocess.run([STRETTO, "jobs", "scale", "a"], capture_output=True).returncode == 2
    assert subprocess.run([STRETTO, "jobs", "scale", "a", "two"], capture_output=True).returncode == 2


def test_shells_are_told_how_to_complete(controller: ControllerProcess, job: RawJob) -> None:
    done = subprocess.run(
        [STRETTO],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "_STRETTO_COMPLETE": "complete_bash",
            "COMP_WORDS": "stretto jobs show ",
            "COMP_CWORD": "3",
            "STRETTO_ENDPOINT": controller.grpc,
        },
    )
    assert done.stdout.split() == ["a"], done.stderr


def test_changes_are_made_and_shown_and_a_running_job_is_not_deleted_unasked(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path, **PATIENT_LIMITS) as controller, RawJob(controller) as job:
        job.pair()
        follower = subprocess.Popen(
            [STRETTO, "jobs", "events", "a", "--follow", "--json", "--endpoint", controller.grpc],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert as_json(controller, "scale", "a", "1")["desired_nodes"] == 1
        assert as_json(controller, "checkpoint", "a")["name"] == "a"
        assert as_json(controller, "pause", "a")["name"] == "a"
        assert controller.get("/api/v1/jobs/a")["paused"]
        assert as_json(controller, "resume", "a")["name"] == "a"
        assert as_json(controller, "drain", "a", "n1")["name"] == "a"
        refused = piped(controller, "delete", "a")
        assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
        terminal = Terminal(STRETTO, "jobs", "delete", "a", "--endpoint", controller.grpc)
        try:
            terminal.until(lambda text: "End and forget it? [y/N]" in text)
            terminal.type("n\r")
            assert terminal.exit_code() == 1
        finally:
            terminal.close()
        assert controller.get("/api/v1/jobs/a")["name"] == "a"
        assert piped(controller, "delete", "a", "--yes").stdout == "the job 'a' is deleted\n"
        told, _ = follower.communicate(timeout=PATIENCE_S)
        assert follower.returncode == 0
        kinds = [json.loads(line)["kind"] for line in told.splitlines()]
        assert {"job_created", "scale_requested", "pause_requested"} <= set(kinds)


def test_a_wide_terminal_is_not_needed_by_the_help() -> None:
    for command in ("list", "show", "scale", "autoscale", "events", "delete"):
        done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [command, "--help"])
        assert done.exit_code == 0
        assert max(map(len, done.stdout.splitlines())) <= 80


def test_creates_a_job_that_waits_for_its_nodes(controller: ControllerProcess, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"min_nodes": 2, "max_nodes": 5, "base_batch_size": 16, "mode": "restart"}))
    made = as_json(controller, "create", "planned", "--spec", str(spec), "--max-nodes", "4", "--nodes", "3")
    assert (made["phase"], made["desired_nodes"], made["nodes"]) == ("pending", 3, [])
    assert made["spec"]["min_nodes"] == 2
    assert made["spec"]["max_nodes"] == 4, "options overrule the file"
    assert made["spec"]["mode"] == "RECONFIGURE_MODE_RESTART"
    assert as_json(controller, "create", "planned", "--spec", str(spec), "--max-nodes", "4", "--nodes", "3") == made
    other = piped(controller, "create", "planned", "--min-nodes", "1")
    assert other.returncode == 1
    assert other.stderr.startswith("error: "), "what exists is not changed"
    assert piped(controller, "delete", "planned", "--yes").returncode == 0


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "Give --min-nodes"),
        ("{", "cannot be read as JSON"),
        ("[1]", "is no JSON object"),
        ('{"min_nodes": 1, "nodes": 2}', "has nodes; allowed: min_nodes"),
        ('{"min_nodes": "1"}', "min_nodes is '1'; allowed: a whole number"),
        ('{"min_nodes": 1, "mode": "live"}', "mode is 'live'; allowed: ('in-process', 'restart')"),
        ('{"min_nodes": 99999999999999}', "the job's spec is"),
    ],
)
def test_says_what_is_wrong_with_a_spec(
    controller: ControllerProcess, tmp_path: Path, said: str | None, words: str
) -> None:
    path = tmp_path / "spec.json"
    if said is not None:
        path.write_text(said)
    done = piped(controller, "create", "never", *(["--spec", str(path)] if said is not None else []))
    assert done.returncode == 2
    assert words in done.stderr
