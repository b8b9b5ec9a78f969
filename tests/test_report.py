"""`stretto report`: one page that holds the run, needs nothing else, and takes no name for markup."""

from __future__ import annotations

import math
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harness.controller import STRETTO, ControllerProcess
from harness.raw_job import PATIENT_LIMITS, RawJob, eventually
from saving.training import damage
from stretto.checkpoint import Checkpointer
from stretto.report.charts import Line, chart
from stretto.report.page import page
from stretto.report.run import Run
from stretto.report.saved import from_checkpoints
from stretto_proto.v1 import jobs_pb2
from stretto_proto.v1 import types_pb2 as types
from trainer_run import Plan, train

HOSTILE = "<script>alert(1)</script>\"'&"


class Elements(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def points(count: int) -> jobs_pb2.ListPointsResponse:
    steps = range(count)
    return jobs_pb2.ListPointsResponse(
        time_s=[1e9 + step for step in steps],
        generation=[1] * count,
        step=steps,
        tau=[1.5 * step for step in steps],
        gain=[1.5] * count,
        scale=[2.0] * count,
        loss=[math.nan if step % 7 == 0 else 1 / (1 + step) for step in steps],
        effective_lr=[0.15] * count,
        base_lr=[0.1] * count,
        progress_rate=[1.5] * count,
    )


def hostile_page() -> str:
    generation = jobs_pb2.GenerationSummary(
        generation=types.Generation(number=1, scale=2.0), started_s=1e9 + 5, end_reason=HOSTILE
    )
    event = jobs_pb2.Event(sequence=1, time_s=1e9, kind=HOSTILE, reason=HOSTILE)
    job = jobs_pb2.Job(name=HOSTILE, phase=HOSTILE, reason=HOSTILE, spec=types.JobSpec(target_tau=100))
    return page(Run(HOSTILE, job, points(50), [generation], [event]))


def test_the_page_is_self_contained_and_has_all_pictures() -> None:
    elements = parsed(hostile_page())
    assert elements.links == []
    assert elements.tags.count("svg") == 5
    assert elements.tags.count("table") == 2


def test_hostile_names_and_reasons_stay_text() -> None:
    elements = parsed(hostile_page())
    assert "script" not in elements.tags
    assert any(HOSTILE in text for text in elements.texts)


def test_a_job_without_points_has_a_page_too() -> None:
    html = page(Run("nobody", jobs_pb2.Job(name="a", phase="pending"), jobs_pb2.ListPointsResponse(), [], []))
    assert "No point was reported" in html


def test_a_diverged_figure_is_a_gap_in_its_line() -> None:
    svg = chart("loss", [0.0, 1.0, 2.0, 3.0, 4.0], [Line("loss", [1.0, 2.0, math.inf, 3.0, 2.5])])
    path = svg.split(' d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert "inf" not in path


def test_a_line_that_never_was_finite_is_said_to_be_missing() -> None:
    assert "nothing was reported" in chart("loss", [0.0, 1.0], [Line("loss", [math.nan, math.inf])])


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_a_constant_has_a_scale(value: float) -> None:
    assert "<svg" in chart("x", [0.0, 1.0], [Line("x", [value, value])])


def test_many_points_do_not_make_a_long_file() -> None:
    times = [float(second) for second in range(100_000)]
    assert len(chart("tau", times, [Line("tau", times)])) < 50_000


@pytest.mark.e2e
def test_a_controllers_job_is_written_to_a_file(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path, **PATIENT_LIMITS) as controller, RawJob(controller, target_tau=100) as job:
        job.pair()
        eventually(lambda: bool(controller.get("/api/v1/jobs/a/history")["points"]["tau"]))
        output = tmp_path / "report.html"
        done = subprocess.run(
            [STRETTO, "report", "a", "-o", str(output), "--endpoint", controller.grpc],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stdout
        elements = parsed(output.read_text())
        assert elements.tags.count("svg") >= 3
        missing = subprocess.run(
            [STRETTO, "report", "nobody", "-o", str(tmp_path / "no.html"), "--endpoint", controller.grpc],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert missing.returncode == 1
        assert "nobody" in missing.stderr
        assert not (tmp_path / "no.html").exists()


def test_a_folder_of_checkpoints_tells_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    plan = Plan(checkpoint=str(folder), target_tau=30.0, settings={"checkpoint_interval_steps": 5})
    reports, _ = train(plan)
    run = from_checkpoints(str(folder))
    assert run.job.name == "checkpoints"
    assert run.job.spec.target_tau == 30.0
    assert list(run.points.step) == [report.step for report in reports]
    assert list(run.points.tau) == [report.tau for report in reports]
    assert list(run.points.loss) == [report.loss for report in reports]
    (generation,) = run.generations
    assert (generation.steps, generation.generation.world_size) == (len(reports), 1)
    assert (generation.first_tau, generation.last_tau) == (reports[0].tau, reports[-1].tau)
    assert [event.kind for event in run.events] == ["checkpoint_committed"] * 3, "as many as are kept"

    # Where the newest is damaged the one before it tells what it knows.
    newest = max(folder.glob("generation-*"))
    damage(newest / "rank-00000.json", "flip a bit")
    earlier = list(from_checkpoints(str(folder)).points.step)
    assert 0 < len(earlier) < len(reports)
    assert earlier == [report.step for report in reports][: len(earlier)]


def test_checkpoints_of_a_loop_of_ones_own_tell_when_they_were_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, job="mine")
    for step in (10, 20):
        checkpointer.save({"seen": step}, step=step, tau=1.5 * step, generation=1)
    damage(tmp_path / max(each.name for each in tmp_path.glob("generation-*")) / "manifest.json", "truncate")
    checkpointer.save({"seen": 30}, step=30, tau=45.0, generation=2)
    run = from_checkpoints(str(tmp_path))
    assert run.job.name == "mine"
    assert list(run.points.tau) == [15.0, 45.0]
    assert [event.kind for event in run.events] == ["checkpoint_committed", "not_whole", "checkpoint_committed"]
    elements = parsed(page(run))
    assert "mine" in elements.texts
    assert elements.tags.count("svg") == 2, "tau and its rate; of the rest nothing is known"


def test_the_command_writes_a_report_from_checkpoints_alone(tmp_path: Path) -> None:
    train(Plan(checkpoint=str(tmp_path / "checkpoints"), target_tau=20.0))

    def report(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [STRETTO, "report", *arguments, "-o", str(tmp_path / "report.html")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    empty = report("--checkpoints", str(tmp_path))
    assert (empty.returncode, "holds no whole checkpoint" in empty.stderr) == (1, True)
    both = report("job", "--checkpoints", str(tmp_path))
    assert (both.returncode, "either a job's name" in both.stderr) == (2, True)
    assert not (tmp_path / "report.html").exists()
    done = report("--checkpoints", str(tmp_path / "checkpoints"))
    assert done.returncode == 0, done.stderr
    assert parsed((tmp_path / "report.html").read_text()).tags.count("svg") == 5
