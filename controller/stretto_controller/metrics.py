"""Every metric: the table of names, and the text that Prometheus gets.

The text is written here: prometheus_client's families cost three times as much, 140 ms for 200 jobs (decision 13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

from stretto_controller.core.goodput.prediction import Recommendation
from stretto_controller.core.model import Cause, NodeState, Phase
from stretto_controller.core.report import Histogram, Progress
from stretto_controller.runner import Runner
from stretto_controller.snapshot import JobView

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. unit: of its value; labels: beside training_job, which all but the controller's own have."""

    name: str
    kind: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        # Not `job`: Prometheus overwrites that label with its own scrape job.
        return self.labels if self.name.startswith("stretto_controller_") else ("training_job", *self.labels)

    @property
    def named_unit(self) -> str:
        """The unit as OpenMetrics' own line tells it; empty where the name, whose last word it must be, has none."""
        return self.unit if self.name.removesuffix("_total").endswith(f"_{self.unit}") else ""

    def head(self, openmetrics: bool) -> str:
        """The lines before its samples. OpenMetrics names a counter without its suffix."""
        name = self.name.removesuffix("_total") if openmetrics else self.name
        unit = f"# UNIT {name} {self.named_unit}\n" if openmetrics and self.named_unit else ""
        return f"# HELP {name} {self.help} Unit: {self.unit}.\n# TYPE {name} {self.kind}\n{unit}"


FAMILIES = (
    Family("stretto_gain_ratio", GAUGE, "ratio", "AdaScale's gain r of the latest step, between 1 and S."),
    Family("stretto_tau_iterations", GAUGE, "iterations", "Scale-invariant iterations done so far."),
    Family("stretto_target_tau_iterations", GAUGE, "iterations", "Training ends when tau reaches this."),
    Family("stretto_effective_learning_rate", GAUGE, "1", "Learning rate in use: gain times base.", ("group",)),
    Family("stretto_base_learning_rate", GAUGE, "1", "Learning rate of the user's schedule at tau.", ("group",)),
    Family("stretto_scale_ratio", GAUGE, "ratio", "Scale S: samples per step over the base batch size."),
    Family("stretto_gradient_variance", GAUGE, "1", "Trace of the gradient's covariance at the base batch size."),
    Family("stretto_gradient_sqr_norm", GAUGE, "1", "Squared norm of the true gradient, as estimated."),
    Family(
        "stretto_adasum_orthogonality_ratio",
        GAUGE,
        "ratio",
        "|adasum|^2 / sum |g_i|^2 over the layers: 1 where the workers' gradients are orthogonal, 1/n where all alike.",
        ("quantile",),
    ),
    Family("stretto_progress_rate", GAUGE, "iterations per second", "d(tau)/dt over the latest seconds."),
    Family("stretto_remaining_seconds", GAUGE, "seconds", "Until tau reaches its target at the present rate."),
    Family("stretto_loss", GAUGE, "1", "Loss of the latest step."),
    Family("stretto_steps_total", COUNTER, "steps", "Optimizer steps done; steps done again count again."),
    Family("stretto_samples_total", COUNTER, "samples", "Samples used; samples used again count again."),
    Family("stretto_step_seconds", HISTOGRAM, "seconds", "Duration of a step, as worker 0 measures it."),
    Family("stretto_nodes", GAUGE, "nodes", "Nodes of the job by state.", ("state",)),
    Family("stretto_world_size", GAUGE, "workers", "Workers of the current generation."),
    Family("stretto_phase", GAUGE, "0 or 1", "1 for the phase that the job is in.", ("phase",)),
    Family("stretto_desired_nodes", GAUGE, "nodes", "Nodes that the job should have."),
    Family("stretto_min_nodes", GAUGE, "nodes", "Fewer nodes than this do not train."),
    Family("stretto_max_nodes", GAUGE, "nodes", "More nodes than this wait as spares."),
    Family("stretto_recommended_nodes", GAUGE, "nodes", "The best size, as the job's goal has it; for HPA and KEDA."),
    Family("stretto_predicted_progress_rate", GAUGE, "iterations per second", "d(tau)/dt at each size.", ("nodes",)),
    Family(
        "stretto_marginal_efficiency_ratio",
        GAUGE,
        "ratio",
        "What each node beyond the size before brings, of what a node brings at the smallest size.",
        ("nodes",),
    ),
    Family("stretto_straggler_ratio", GAUGE, "ratio", "Longest time at an own part of a step over the median step."),
    Family("stretto_generation", GAUGE, "1", "Number of the current generation."),
    Family("stretto_generation_changes_total", COUNTER, "changes", "Generations begun, by cause.", ("reason",)),
    Family(
        "stretto_reconfigure_seconds",
        HISTOGRAM,
        "seconds",
        "From the first worker's stop to the new generation's first step, for planned and unplanned changes.",
        ("kind",),
    ),
    Family("stretto_checkpoint_age_seconds", GAUGE, "seconds", "Since the latest checkpoint was committed."),
    Family("stretto_checkpoint_seconds", HISTOGRAM, "seconds", "Duration of writing a checkpoint."),
    Family("stretto_checkpoint_bytes", GAUGE, "bytes", "Size of the latest checkpoint."),
    Family("stretto_controller_leader", GAUGE, "0 or 1", "1 on the controller that decides."),
    Family("stretto_controller_sessions", GAUGE, "streams", "Open streams of agents and workers."),
    Family("stretto_controller_decision_seconds", HISTOGRAM, "seconds", "Duration of one decision of the core."),
    Family("stretto_controller_store_errors_total", COUNTER, "errors", "Saves that failed."),
)


_LABEL_NAMES = {family.name: family.label_names for family in FAMILIES}


@dataclass(slots=True)
class Samples:
    """What one scrape tells: the lines of every family of the table, by its name. An unknown name is a KeyError.

    Label values are words of ours, numbers, and jobs' names, which are DNS labels: none needs an escape.
    """

    lines: dict[str, list[str]] = field(default_factory=lambda: {family.name: [] for family in FAMILIES})

    def put(self, name: str, value: float, *labels: str) -> None:
        self.lines[name].append(f"{_series(name, labels)} {_number(value)}\n")

    def put_histogram(self, name: str, histogram: Histogram, *labels: str) -> None:
        buckets = _buckets(name, labels, histogram.upper_bounds)
        counts = (*histogram.cumulative_counts, histogram.count, histogram.count)
        told = [f"{series} {count}\n" for series, count in zip(buckets, counts, strict=True) if series]
        self.lines[name] += [*told, f"{_series(name, labels, '_sum')} {_number(histogram.sum)}\n"]

    def text(self, openmetrics: bool) -> str:
        parts = ["".join([family.head(openmetrics), *self.lines[family.name]]) for family in FAMILIES]
        return "".join([*parts, "# EOF\n" if openmetrics else ""])


# Most of a scrape's text is the same as in the one before: half of its time went into writing that again.
@lru_cache(maxsize=100_000)
def _series(name: str, values: tuple[str, ...], suffix: str = "", le: str = "") -> str:
    """A sample's name and labels. le: of a histogram's bucket."""
    pairs = [f'{label}="{value}"' for label, value in zip(_LABEL_NAMES[name], values, strict=True)]
    if le:
        pairs.append(f'le="{le}"')
    return f"{name}{suffix}{{{','.join(pairs)}}}" if pairs else f"{name}{suffix}"


@lru_cache(maxsize=10_000)
def _buckets(name: str, values: tuple[str, ...], upper_bounds: tuple[float, ...]) -> tuple[str, ...]:
    """A histogram's buckets, then its count; an upper bound that is infinite has none, the last bucket tells it."""
    finite = [
        _series(name, values, "_bucket", _number(bound)) if math.isfinite(bound) else "" for bound in upper_bounds
    ]
    return (*finite, _series(name, values, "_bucket", "+Inf"), _series(name, values, "_count"))


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def exposition(runner: Runner, finished_series_s: float, *, openmetrics: bool = False) -> str:
    """All that a scrape tells, in Prometheus' text format or in OpenMetrics.

    It reads the runner when asked, so that a job's series are there exactly as long as they should be.
    """
    samples = Samples()
    wall_s = runner.wall_s()
    for view in runner.views():
        if not view.record.phase.finished or wall_s - view.marks.finished_s < finished_series_s:
            _job(samples, view, wall_s)
    samples.put("stretto_controller_leader", float(runner.ready))
    samples.put("stretto_controller_sessions", len(runner.sessions))
    samples.put("stretto_controller_store_errors_total", runner.store_errors)
    samples.put_histogram("stretto_controller_decision_seconds", runner.decision_seconds.histogram)
    return samples.text(openmetrics)


def _job(samples: Samples, view: JobView, wall_s: float) -> None:
    record, name = view.record, view.record.name
    for phase in Phase:
        samples.put("stretto_phase", float(record.phase is phase), name, phase.value)
    states = [node.state for node in record.nodes.values()]
    for state in NodeState:
        samples.put("stretto_nodes", states.count(state), name, state.value)
    samples.put("stretto_desired_nodes", record.wanted_nodes, name)
    samples.put("stretto_min_nodes", record.spec.min_nodes, name)
    samples.put("stretto_max_nodes", record.spec.max_nodes, name)
    if record.spec.target_tau:
        samples.put("stretto_target_tau_iterations", record.spec.target_tau, name)
    if record.generation is not None:
        samples.put("stretto_generation", record.generation.number, name)
        samples.put("stretto_world_size", record.generation.world_size, name)
        if record.generation.scale:
            samples.put("stretto_scale_ratio", record.generation.scale, name)
    if record.checkpoint is not None:
        samples.put("stretto_checkpoint_bytes", record.checkpoint.size_bytes, name)
        samples.put("stretto_checkpoint_age_seconds", max(0.0, wall_s - view.marks.checkpoint_s), name)
    if view.straggler_ratio is not None:
        samples.put("stretto_straggler_ratio", view.straggler_ratio, name)
    if view.recommendation is not None and not record.phase.finished:
        _recommended(samples, name, view.recommendation)
    _counted(samples, view)
    if view.progress is not None:
        _progress(samples, view, view.progress)


def _recommended(samples: Samples, name: str, recommendation: Recommendation) -> None:
    if recommendation.nodes:
        samples.put("stretto_recommended_nodes", recommendation.nodes, name)
    for size in recommendation.sizes:
        samples.put("stretto_predicted_progress_rate", size.progress_rate, name, str(size.nodes))
        samples.put("stretto_marginal_efficiency_ratio", size.marginal_efficiency, name, str(size.nodes))


def _counted(samples: Samples, view: JobView) -> None:
    name, figures = view.record.name, view.figures
    samples.put("stretto_steps_total", figures.counted.steps, name)
    samples.put("stretto_samples_total", figures.counted.samples, name)
    # All causes from the start: a series that appears with its first event has no rate for it.
    for cause in Cause:
        samples.put("stretto_generation_changes_total", figures.changes[cause], name, cause.value)
    for kind, observations in figures.reconfigure_seconds.items():
        samples.put_histogram("stretto_reconfigure_seconds", observations.histogram, name, kind)
    samples.put_histogram("stretto_checkpoint_seconds", figures.checkpoint_seconds.histogram, name)
    samples.put_histogram("stretto_step_seconds", figures.counted.step_seconds, name)


def _progress(samples: Samples, view: JobView, progress: Progress) -> None:
    name = view.record.name
    samples.put("stretto_gain_ratio", progress.gain, name)
    samples.put("stretto_tau_iterations", progress.tau, name)
    samples.put("stretto_gradient_variance", progress.variance, name)
    samples.put("stretto_gradient_sqr_norm", progress.sqr_norm, name)
    samples.put("stretto_loss", progress.loss, name)
    for quantile, ratio in zip(("0", "0.5", "1"), progress.orthogonality, strict=False):
        samples.put("stretto_adasum_orthogonality_ratio", ratio, name, quantile)
    samples.put("stretto_progress_rate", view.progress_rate, name)
    if not math.isnan(view.remaining_s):
        samples.put("stretto_remaining_seconds", view.remaining_s, name)
    rates = chain(
        (("stretto_effective_learning_rate", *pair) for pair in enumerate(progress.effective_lr)),
        (("stretto_base_learning_rate", *pair) for pair in enumerate(progress.base_lr)),
    )
    for family, group, rate in rates:
        samples.put(family, rate, name, str(group))
