"""Writes the Grafana dashboards: dashboards.py FOLDER. `make dashboards` does; a test says when they are stale.

JSON of this length is not for hands: here each panel is one call with its title, unit and queries.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = {"type": "prometheus", "uid": "stretto-prometheus"}
JOB = 'training_job="$training_job"'
WIDTH = 24


@dataclass
class Dashboard:
    """Panels from left to right, then downwards."""

    uid: str
    title: str
    description: str
    panels: list[dict[str, Any]] = field(default_factory=list)
    variables: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    _x: int = 0
    _y: int = 0
    _row_height: int = 0

    def row(self, title: str) -> None:
        self._break()
        self.panels.append(
            {
                "type": "row",
                "title": title,
                "id": len(self.panels) + 1,
                "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": self._y},
                "collapsed": False,
                "panels": [],
            }
        )
        self._y += 1

    def add(self, kind: str, title: str, unit: str, queries: dict[str, str], **options: Any) -> None:
        """queries: legend -> PromQL. options: width, height, description, steps, minimum, link, instant, mappings."""
        width, height = options.get("width", 12), options.get("height", 8)
        if self._x + width > WIDTH:
            self._break()
        steps = [{"color": color, "value": value} for value, color in options.get("steps", [(None, "green")])]
        defaults: dict[str, Any] = {
            "unit": unit,
            "thresholds": {"mode": "absolute", "steps": steps},
            "mappings": options.get("mappings", []),
        }
        if kind == "timeseries":
            shown = "dashed" if len(steps) > 1 else "off"
            defaults["custom"] = {"lineWidth": 2, "fillOpacity": 6, "spanNulls": False}
            defaults["custom"]["thresholdsStyle"] = {"mode": shown}
        if "minimum" in options:
            defaults["min"] = options["minimum"]
        if "link" in options:
            defaults["links"] = [options["link"]]
        instant = options.get("instant", kind in ("stat", "table", "bargauge"))
        self.panels.append(
            {
                "type": kind,
                "title": title,
                "description": options.get("description", ""),
                "id": len(self.panels) + 1,
                "datasource": SOURCE,
                "gridPos": {"h": height, "w": width, "x": self._x, "y": self._y},
                "fieldConfig": {"defaults": defaults, "overrides": options.get("overrides", [])},
                "options": _options(kind),
                "transformations": options.get("transformations", []),
                "targets": [
                    {
                        "refId": chr(ord("A") + index),
                        "datasource": SOURCE,
                        "expr": expression,
                        "legendFormat": legend,
                        "instant": instant,
                        "range": not instant,
                        **({"format": "table"} if kind == "table" else {}),
                    }
                    for index, (legend, expression) in enumerate(queries.items())
                ],
            }
        )
        self._x += width
        self._row_height = max(self._row_height, height)

    def json(self) -> str:
        links = [
            {
                "title": "Stretto dashboards",
                "type": "dashboards",
                "tags": ["stretto"],
                "asDropdown": True,
                "keepTime": True,
            }
        ]
        return (
            json.dumps(
                {
                    "uid": self.uid,
                    "title": self.title,
                    "description": self.description,
                    "tags": ["stretto"],
                    "schemaVersion": 39,
                    "version": 1,
                    "editable": True,
                    "graphTooltip": 1,
                    "refresh": "10s",
                    "time": {"from": "now-1h", "to": "now"},
                    "timezone": "browser",
                    "links": links,
                    "templating": {"list": self.variables},
                    "annotations": {"list": self.annotations},
                    "panels": self.panels,
                },
                indent=1,
            )
            + "\n"
        )

    def _break(self) -> None:
        self._x, self._y, self._row_height = 0, self._y + self._row_height, 0


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if kind in ("stat", "bargauge"):
        reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": reduce, "orientation": "horizontal" if kind == "bargauge" else "auto"}
    return {}


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": False,
        "includeAll": False,
    }


def fleet() -> Dashboard:
    board = Dashboard("stretto-fleet", "Stretto: fleet", "All jobs: who trains, how far, and who needs a look.")
    to_job = {"title": "this job", "url": "/d/stretto-job?var-training_job=${__field.labels.training_job}"}
    running = 'sum(max by (training_job) (stretto_phase{phase="running"}))'
    waiting = 'sum(max by (training_job, phase) (stretto_phase{phase=~"pending|forming|waiting|reconfiguring"}))'
    failed = 'sum(max by (training_job) (stretto_phase{phase="failed"}))'
    board.add("stat", "Jobs that run", "none", {"": running}, width=6, height=4)
    board.add("stat", "Waiting or changing", "none", {"": waiting}, width=6, height=4, steps=WARN_ABOVE_0)
    board.add("stat", "Failed in the last 10 minutes", "none", {"": failed}, width=6, height=4, steps=BAD_ABOVE_0)
    board.add("stat", "Nodes at work", "none", {"": 'sum(stretto_nodes{state="active"})'}, width=6, height=4)
    done = "max by (training_job) (stretto_tau_iterations) / max by (training_job) (stretto_target_tau_iterations)"
    board.add("bargauge", "Done", "percentunit", {"{{training_job}}": done}, minimum=0, link=to_job)
    left = "max by (training_job) (stretto_remaining_seconds)"
    board.add("bargauge", "Remaining time", "s", {"{{training_job}}": left}, link=to_job)
    phase = "max by (training_job, phase) (stretto_phase) == 1"
    board.add("timeseries", "Phase", "none", {"{{training_job}} {{phase}}": phase}, link=to_job, minimum=0)
    nodes = 'max by (training_job) (stretto_nodes{state="active"})'
    board.add("timeseries", "Active nodes", "none", {"{{training_job}}": nodes}, minimum=0, link=to_job)
    rate = "max by (training_job) (stretto_progress_rate)"
    board.add("timeseries", "d(tau)/dt", "iops", {"{{training_job}}": rate}, minimum=0, link=to_job)
    worth = "max by (training_job) (stretto_gain_ratio) / max by (training_job) (stretto_scale_ratio)"
    board.add("timeseries", "Gain per scale", "percentunit", {"{{training_job}}": worth}, minimum=0, link=to_job)
    straggler = "max by (training_job) (stretto_straggler_ratio)"
    board.add(
        "timeseries", "Straggler", "none", {"{{training_job}}": straggler}, steps=[(None, "green"), (3, "orange")]
    )
    age = "max by (training_job) (stretto_checkpoint_age_seconds)"
    board.add(
        "timeseries", "Age of the checkpoint", "s", {"{{training_job}}": age}, steps=[(None, "green"), (3600, "orange")]
    )
    return board


WARN_ABOVE_0 = [(None, "green"), (1, "orange")]
BAD_ABOVE_0 = [(None, "green"), (1, "red")]


def _of_job(name: str, more: str = "") -> str:
    """One series, whichever controller tells it."""
    return f"max without (instance, job) ({name}{{{JOB}{more}}})"


def job() -> Dashboard:
    board = Dashboard("stretto-job", "Stretto: job", "One job: is it healthy, how fast is it, and why did it change?")
    board.variables = [_variable("training_job", "job", "label_values(stretto_phase, training_job)")]
    changes = f"changes(stretto_generation{{{JOB}}}[$__interval]) > 0"
    board.annotations = [
        {
            "name": "generation changes",
            "datasource": SOURCE,
            "enable": True,
            "iconColor": "orange",
            "expr": changes,
            "step": "10s",
            "titleFormat": "new generation",
            "tagKeys": "training_job",
        }
    ]
    _job_now(board)
    _job_training(board)
    _job_changes(board)
    return board


def _job_now(board: Dashboard) -> None:
    small = {"width": 4, "height": 4}
    board.add("stat", "Phase", "none", {"{{phase}}": f"stretto_phase{{{JOB}}} == 1"}, **small, overrides=[])
    board.panels[-1]["options"]["textMode"] = "name"
    board.add("stat", "Remaining", "s", {"": _of_job("stretto_remaining_seconds")}, **small)
    board.add("stat", "Workers", "none", {"": _of_job("stretto_world_size")}, **small)
    board.add("stat", "Scale S", "none", {"": _of_job("stretto_scale_ratio")}, **small)
    board.add("stat", "Gain r", "none", {"": _of_job("stretto_gain_ratio")}, **small)
    age = [(None, "green"), (3600, "orange")]
    board.add("stat", "Checkpoint age", "s", {"": _of_job("stretto_checkpoint_age_seconds")}, **small, steps=age)


def _job_training(board: Dashboard) -> None:
    board.row("Training")
    tau = {"tau": _of_job("stretto_tau_iterations"), "target": _of_job("stretto_target_tau_iterations")}
    board.add(
        "timeseries", "tau", "none", tau, minimum=0, description="Scale-invariant iterations, and where they end."
    )
    gain = {"gain r": _of_job("stretto_gain_ratio"), "scale S": _of_job("stretto_scale_ratio")}
    board.add("timeseries", "Gain and scale", "none", gain, minimum=0, description="r is between 1 and S.")
    rates = {
        "effective {{group}}": _of_job("stretto_effective_learning_rate"),
        "base {{group}}": _of_job("stretto_base_learning_rate"),
    }
    board.add("timeseries", "Learning rate", "none", rates, minimum=0, description="Effective: gain times base.")
    board.add("timeseries", "Loss", "none", {"loss": _of_job("stretto_loss")})
    board.add("timeseries", "d(tau)/dt", "iops", {"measured": _of_job("stretto_progress_rate")}, minimum=0)
    by_size = (
        f"max without (instance, job) (stretto_progress_rate{{{JOB}}})"
        f" / on (training_job) group_left () max without (instance, job) (stretto_world_size{{{JOB}}})"
    )
    board.add("timeseries", "d(tau)/dt per worker", "iops", {"per worker": by_size}, minimum=0)
    expected = {"{{nodes}} nodes": _of_job("stretto_predicted_progress_rate")}
    board.add(
        "timeseries",
        "d(tau)/dt by size: predicted, and measured",
        "iops",
        {**expected, "measured": _of_job("stretto_progress_rate")},
        minimum=0,
        description="What the controller expects at each number of nodes, from the sizes that it has seen.",
    )
    floor = [(None, "red"), (0.5, "green")]
    board.add(
        "timeseries",
        "What each added node brings",
        "percentunit",
        {"{{nodes}} nodes": _of_job("stretto_marginal_efficiency_ratio")},
        steps=floor,
        minimum=0,
        description="As a share of what a node brings at min_nodes; 50 % is the usual floor of what is recommended.",
    )
    noise = {"variance": _of_job("stretto_gradient_variance"), "squared norm": _of_job("stretto_gradient_sqr_norm")}
    board.add("timeseries", "Gradient", "none", noise, description="What the gain is made of.")
    worth = {"share": f"max by (training_job) (stretto:added_scale_worth:ratio{{{JOB}}})"}
    low = [(None, "red"), (0.1, "green")]
    board.add(
        "timeseries",
        "Share of the added scale that pays",
        "percentunit",
        worth,
        steps=low,
        minimum=0,
        description="(r - 1) / (S - 1). Empty while S is 1.",
    )
    quantiles = {"lowest layer": "0", "median": "0.5", "highest": "1"}
    ratio = "stretto_adasum_orthogonality_ratio"
    board.add(
        "timeseries",
        "Orthogonality of the ranks' gradients",
        "percentunit",
        {name: _of_job(ratio, f',quantile="{quantile}"') for name, quantile in quantiles.items()},
        minimum=0,
        description="Under the Adasum rules: 100 % where the ranks' gradients are orthogonal, 1/n where all are alike.",
    )


def _job_changes(board: Dashboard) -> None:
    board.row("Nodes, changes and pauses")
    nodes = {
        "{{state}}": _of_job("stretto_nodes"),
        "wanted": _of_job("stretto_desired_nodes"),
        "recommended": _of_job("stretto_recommended_nodes"),
        "min": _of_job("stretto_min_nodes"),
        "max": _of_job("stretto_max_nodes"),
    }
    board.add("timeseries", "Nodes", "none", nodes, minimum=0)
    board.add(
        "timeseries",
        "Generation changes",
        "none",
        {"{{reason}}": f"sum by (reason) (increase(stretto_generation_changes_total{{{JOB}}}[$__rate_interval]))"},
        minimum=0,
    )
    kinds = f"sum by (kind, le) (increase(stretto_reconfigure_seconds_bucket{{{JOB}}}[$__range]))"
    board.add(
        "timeseries", "Pauses, 90 % below", "s", {"{{kind}}": f"histogram_quantile(0.9, {kinds})"}, minimum=0, width=8
    )
    step = f"sum by (le) (rate(stretto_step_seconds_bucket{{{JOB}}}[$__rate_interval]))"
    quantiles = {f"{q:.0%} below": f"histogram_quantile({q}, {step})" for q in (0.5, 0.9, 0.99)}
    board.add("timeseries", "Step time", "s", quantiles, minimum=0, width=8)
    three = [(None, "green"), (3, "orange")]
    board.add(
        "timeseries",
        "Straggler",
        "none",
        {"ratio": _of_job("stretto_straggler_ratio")},
        steps=three,
        minimum=0,
        width=8,
    )
    work = {
        "steps": f"sum(rate(stretto_steps_total{{{JOB}}}[$__rate_interval]))",
        "samples": f"sum(rate(stretto_samples_total{{{JOB}}}[$__rate_interval]))",
    }
    board.add("timeseries", "Steps and samples per second", "cps", work, minimum=0, width=8)
    saving = (
        f"sum(increase(stretto_checkpoint_seconds_sum{{{JOB}}}[$__range]))"
        f" / sum(increase(stretto_checkpoint_seconds_count{{{JOB}}}[$__range]))"
    )
    board.add("timeseries", "Time to write a checkpoint", "s", {"mean": saving}, minimum=0, width=8)
    board.add(
        "timeseries", "Size of a checkpoint", "bytes", {"size": _of_job("stretto_checkpoint_bytes")}, minimum=0, width=8
    )


def controller() -> Dashboard:
    board = Dashboard("stretto-controller", "Stretto: controller", "The process that decides: is it there and quick?")
    small = {"width": 6, "height": 4}
    leader = [(None, "red"), (1, "green")]
    board.add("stat", "Leaders", "none", {"": "sum(stretto_controller_leader)"}, **small, steps=leader)
    board.add("stat", "Streams", "none", {"": "sum(stretto_controller_sessions)"}, **small)
    errors = "sum(stretto_controller_store_errors_total)"
    board.add("stat", "Saves that failed", "none", {"": errors}, **small, steps=BAD_ABOVE_0)
    board.add("stat", "Jobs", "none", {"": "count(count by (training_job) (stretto_phase))"}, **small)
    board.add("timeseries", "Streams of agents and workers", "none", {"{{instance}}": "stretto_controller_sessions"})
    decisions = "rate(stretto_controller_decision_seconds_count[$__rate_interval])"
    board.add("timeseries", "Decisions per second", "cps", {"{{instance}}": f"sum by (instance) ({decisions})"})
    buckets = "sum by (le) (rate(stretto_controller_decision_seconds_bucket[$__rate_interval]))"
    quantiles = {f"{q:.0%} below": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.99)}
    board.add("timeseries", "Time of a decision", "s", quantiles, steps=[(None, "green"), (0.05, "orange")])
    busy = "sum by (instance) (rate(stretto_controller_decision_seconds_sum[$__rate_interval]))"
    board.add("timeseries", "Share of a core that decides", "percentunit", {"{{instance}}": busy}, minimum=0)
    scrape = 'scrape_duration_seconds{job="stretto-controller"}'
    board.add("timeseries", "Time of a scrape", "s", {"{{instance}}": scrape}, minimum=0)
    up = 'up{job="stretto-controller"}'
    board.add("timeseries", "Can be scraped", "bool_yes_no", {"{{instance}}": up}, minimum=0)
    return board


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for board in (fleet(), job(), controller()):
        (folder / f"{board.uid}.json").write_text(board.json())


if __name__ == "__main__":
    main()
