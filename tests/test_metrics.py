"""Metrics: the names of the design, the numbers of the workers, series that come and go with their job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from harness.bench import SPEC, Bench, hello
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from stretto_controller.core.events import (
    CheckpointCommitted,
    DeleteRequested,
    JobCreated,
    NodeLeft,
    WorkerAlive,
    WorkerHello,
    WorkerProgressed,
)
from stretto_controller.core.model import JobSpec, Mode, WorkerReady
from stretto_controller.core.report import Checkpoint, Histogram, Pace, Progress
from stretto_controller.figures import CountedSteps, Figures, Observations, ProgressRate
from stretto_controller.metrics import COUNTER, FAMILIES, HISTOGRAM, exposition

# Dashboards, alerts and other tools rely on these.
NAMES = [
    "stretto_gain_ratio",
    "stretto_tau_iterations",
    "stretto_effective_learning_rate",
    "stretto_base_learning_rate",
    "stretto_scale_ratio",
    "stretto_gradient_variance",
    "stretto_gradient_sqr_norm",
    "stretto_adasum_orthogonality_ratio",
    "stretto_progress_rate",
    "stretto_remaining_seconds",
    "stretto_loss",
    "stretto_steps_total",
    "stretto_samples_total",
    "stretto_step_seconds",
    "stretto_nodes",
    "stretto_world_size",
    "stretto_target_tau_iterations",
    "stretto_phase",
    "stretto_desired_nodes",
    "stretto_min_nodes",
    "stretto_max_nodes",
    "stretto_recommended_nodes",
    "stretto_predicted_progress_rate",
    "stretto_marginal_efficiency_ratio",
    "stretto_straggler_ratio",
    "stretto_generation",
    "stretto_generation_changes_total",
    "stretto_reconfigure_seconds",
    "stretto_checkpoint_age_seconds",
    "stretto_checkpoint_seconds",
    "stretto_checkpoint_bytes",
    "stretto_controller_leader",
    "stretto_controller_sessions",
    "stretto_controller_decision_seconds",
    "stretto_controller_store_errors_total",
]

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(bench: Bench, finished_series_s: float = 600.0) -> Series:
    text = exposition(bench.runner, finished_series_s)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def value(series: Series, name: str, job: str = "a", **labels: str) -> float:
    return series[name, tuple(sorted({"training_job": job, **labels}.items()))]


def jobs_of(series: Series) -> set[str]:
    return {label for _, labels in series for key, label in labels if key == "training_job"}


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def running(bench: Bench) -> None:
    """Job a in generation 1 with one worker."""
    bench.join("a", "n0")
    await bench.store.finish()
    await bench.train("a")


async def test_every_name_of_the_design_is_there_before_there_is_any_data(bench: Bench) -> None:
    assert sorted(family.name for family in FAMILIES) == sorted(NAMES)
    text = exposition(bench.runner, 600.0)
    for family in FAMILIES:
        kind = {COUNTER: "counter", HISTOGRAM: "histogram"}.get(family.kind, "gauge")
        assert f"# TYPE {family.name} {kind}\n" in text
        assert f"# HELP {family.name} {family.help}" in text
    assert jobs_of(scrape(bench)) == set()


async def test_openmetrics_text_is_valid(bench: Bench) -> None:
    await running(bench)
    await bench.progress("a", step=3, tau=4.5)
    text = exposition(bench.runner, 600.0, openmetrics=True)
    families = parse_openmetrics(text)  # type: ignore[no-untyped-call]  # untyped there
    names = {family.name for family in families}
    assert {name.removesuffix("_total") for name in NAMES} <= names


async def test_openmetrics_tells_the_unit_wherever_it_is_the_names_last_word(bench: Bench) -> None:
    text = exposition(bench.runner, 600.0, openmetrics=True)
    units = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# UNIT"))
    assert units["stretto_tau_iterations"] == "iterations"
    assert units["stretto_steps"] == "steps"
    assert units["stretto_step_seconds"] == "seconds"
    assert units["stretto_checkpoint_bytes"] == "bytes"
    assert units["stretto_gain_ratio"] == "ratio"
    assert "stretto_world_size" not in units, "its unit, workers, is not in its name"
    unnamed = {family.name for family in FAMILIES if family.unit not in family.help and not family.named_unit}
    assert all(f"Unit: {family.unit}." in text for family in FAMILIES if family.name in unnamed)


async def test_a_job_has_a_bounded_number_of_series(bench: Bench) -> None:
    await running(bench)
    await bench.progress("a", step=3, tau=4.5)
    before = scrape(bench).keys()
    for step in range(4, 40):
        bench.now_s += 1.0
        await bench.progress("a", step=step, tau=float(step), loss=1.0 / step)
    added = scrape(bench).keys() - before
    assert {name for name, _ in added} <= {"stretto_remaining_seconds"}
    assert len([1 for _, labels in before if ("training_job", "a") in labels]) < 100


async def test_the_workers_figures_are_exported_as_they_came(bench: Bench) -> None:
    await running(bench)
    report = Progress(
        generation=1,
        step=3,
        tau=4.5,
        gain=1.5,
        loss=math.inf,
        effective_lr=(0.15, 0.3),
        base_lr=(0.1, 0.2),
        variance=-2.0,
        sqr_norm=7.0,
        samples=96,
        step_seconds=Histogram((0.1, 1.0), (2, 3), 3, 0.9),
        orthogonality=(0.5, 0.75, 1.0),
    )
    bench.runner.submit("a", WorkerProgressed("a-w", report))
    await bench.store.finish()
    series = scrape(bench)
    assert value(series, "stretto_gain_ratio") == 1.5
    assert value(series, "stretto_tau_iterations") == 4.5
    assert value(series, "stretto_target_tau_iterations") == 100.0
    assert value(series, "stretto_loss") == math.inf
    assert value(series, "stretto_effective_learning_rate", group="1") == 0.3
    assert value(series, "stretto_base_learning_rate", group="0") == 0.1
    assert value(series, "stretto_scale_ratio") == 1.0
    assert value(series, "stretto_gradient_variance") == -2.0
    assert value(series, "stretto_gradient_sqr_norm") == 7.0
    for quantile, ratio in (("0", 0.5), ("0.5", 0.75), ("1", 1.0)):
        assert value(series, "stretto_adasum_orthogonality_ratio", quantile=quantile) == ratio
    assert value(series, "stretto_steps_total") == 3
    assert value(series, "stretto_samples_total") == 96
    assert value(series, "stretto_step_seconds_bucket", le="0.1") == 2
    assert value(series, "stretto_step_seconds_bucket", le="+Inf") == 3
    assert value(series, "stretto_step_seconds_sum") == 0.9


async def test_the_job_s_state_is_exported(bench: Bench) -> None:
    await running(bench)
    series = scrape(bench)
    assert value(series, "stretto_phase", phase="running") == 1
    assert sum(v for (name, _), v in series.items() if name == "stretto_phase") == 1
    assert value(series, "stretto_nodes", state="active") == 1
    assert value(series, "stretto_nodes", state="lost") == 0
    for name in ("generation", "world_size", "desired_nodes", "min_nodes", "max_nodes"):
        assert value(series, f"stretto_{name}") == 1, name
    assert value(series, "stretto_generation_changes_total", reason="start") == 1
    assert value(series, "stretto_generation_changes_total", reason="node_lost") == 0
    assert series["stretto_controller_leader", ()] == 1
    assert series["stretto_controller_sessions", ()] == 2
    assert series["stretto_controller_decision_seconds_count", ()] >= 2


async def test_the_slowest_live_worker_shows_in_the_straggler_ratio(bench: Bench) -> None:
    bench.join("a", "n0", replace(SPEC, mode=Mode.IN_PROCESS))
    bench.runner.submit("a", WorkerHello("w", "n0", 0, -1, 0, JobSpec(), WorkerReady(1)))
    await bench.store.finish()
    name, labels = "stretto_straggler_ratio", (("training_job", "a"),)
    assert (name, labels) not in scrape(bench), "nothing is known yet"
    bench.runner.submit("a", WorkerAlive("w", Pace(1, 5, 2.0, 0.0, 0.5)))
    assert value(scrape(bench), name) == 4.0


async def test_a_checkpoint_has_an_age_a_size_and_a_duration(bench: Bench) -> None:
    await running(bench)
    bench.runner.submit("a", CheckpointCommitted("a-w", Checkpoint(1, 5, 6.0, "/c", 1000, 0.7)))
    await bench.store.finish()
    bench.wall_s += 30
    series = scrape(bench)
    assert value(series, "stretto_checkpoint_age_seconds") == 30
    assert value(series, "stretto_checkpoint_bytes") == 1000
    assert value(series, "stretto_checkpoint_seconds_sum") == 0.7


async def test_a_deleted_job_s_series_disappear_at_once_and_others_stay(bench: Bench) -> None:
    await running(bench)
    bench.runner.submit("b", JobCreated(SPEC))
    await bench.store.finish()
    assert jobs_of(scrape(bench)) == {"a", "b"}
    bench.runner.submit("a", DeleteRequested())
    await bench.store.finish()
    assert jobs_of(scrape(bench)) == {"b"}


async def test_a_finished_job_s_series_disappear_after_ten_minutes_and_come_back_with_its_name(
    bench: Bench,
) -> None:
    await running(bench)
    bench.runner.submit("a", NodeLeft("n0", "a-n0", failed=True))
    await bench.store.finish()
    bench.wall_s += 599
    assert value(scrape(bench), "stretto_phase", phase="failed") == 1
    bench.wall_s += 2
    assert jobs_of(scrape(bench)) == set()
    bench.open("again")
    bench.runner.submit("a", hello("n9", "again"))
    await bench.store.finish()
    assert value(scrape(bench), "stretto_phase", phase="running") == 1
    assert value(scrape(bench), "stretto_steps_total") == 0


async def test_remaining_time_is_absent_until_it_is_known(bench: Bench) -> None:
    await running(bench)
    await bench.progress("a", step=1, tau=10.0)
    labels = (("training_job", "a"),)
    assert ("stretto_remaining_seconds", labels) not in scrape(bench)
    bench.now_s += 2.0
    await bench.progress("a", step=2, tau=20.0)
    series = scrape(bench)
    assert value(series, "stretto_progress_rate") == 5.0
    assert value(series, "stretto_remaining_seconds") == 16.0


def reports(rate: ProgressRate, pairs: Iterator[tuple[float, float]]) -> None:
    for now_s, tau in pairs:
        rate.note(tau, now_s)


def test_the_rate_forgets_what_is_older_than_its_window() -> None:
    rate = ProgressRate(10.0)
    reports(rate, ((float(t), 100.0 * t) for t in range(20)))
    reports(rate, ((float(t), 1900.0 + (t - 19)) for t in range(20, 31)))
    assert rate.value(30.0) == pytest.approx(1.0)


def test_the_rate_stands_still_between_reports_and_falls_when_they_stop() -> None:
    rate = ProgressRate(10.0)
    reports(rate, ((float(t), 2.0 * t) for t in range(6)))
    assert rate.value(5.0) == rate.value(5.9) == 2.0
    assert 0 < rate.value(12.0) < 1.5
    assert rate.value(15.0) == 0.0


def test_the_rate_begins_anew_when_tau_goes_back_to_a_checkpoint() -> None:
    rate = ProgressRate(10.0)
    reports(rate, iter([(0.0, 0.0), (1.0, 50.0), (2.0, 20.0)]))
    assert rate.value(2.0) == 0.0
    rate.note(23.0, 3.0)
    assert rate.value(3.0) == 3.0


def test_counters_never_fall_when_workers_restart_or_go_back() -> None:
    counted = CountedSteps()
    steps, samples, seconds = [], [], []
    for step, count in [(10, 10), (20, 20), (15, 2), (25, 12), (26, 13)]:
        histogram = Histogram((1.0,), (count,), count, count / 10)
        counted.note(Progress(1, step, samples=step * 32, step_seconds=histogram))
        steps.append(counted.steps)
        samples.append(counted.samples)
        seconds.append(counted.step_seconds.count)
    assert steps == [10, 20, 20, 30, 31]
    assert samples == [value * 32 for value in steps]
    assert seconds == [10, 20, 22, 32, 33]
    assert counted.step_seconds.cumulative_counts == (33,)
    assert counted.step_seconds.sum == pytest.approx(3.3)


def test_remaining_time_is_zero_at_the_target() -> None:
    figures = Figures(10.0)
    assert figures.remaining_s(100.0, 100.0, 0.0) == 0.0
    assert math.isnan(figures.remaining_s(1.0, 0.0, 0.0))
    assert math.isnan(figures.remaining_s(1.0, 100.0, 0.0))


def test_observations_are_cumulative_and_a_bound_belongs_to_its_bucket() -> None:
    observations = Observations((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 2.0, 9.0):
        observations.observe(seconds)
    assert observations.histogram == Histogram((1.0, 2.0), (2, 4), 5, 14.0)


def test_only_labels_of_the_design_are_used() -> None:
    labels = {family.name: family.labels for family in FAMILIES if family.labels}
    assert labels == {
        "stretto_effective_learning_rate": ("group",),
        "stretto_base_learning_rate": ("group",),
        "stretto_adasum_orthogonality_ratio": ("quantile",),
        "stretto_predicted_progress_rate": ("nodes",),
        "stretto_marginal_efficiency_ratio": ("nodes",),
        "stretto_nodes": ("state",),
        "stretto_phase": ("phase",),
        "stretto_generation_changes_total": ("reason",),
        "stretto_reconfigure_seconds": ("kind",),
    }
    assert all("job" not in family.label_names for family in FAMILIES)
