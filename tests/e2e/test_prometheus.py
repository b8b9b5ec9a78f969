"""A real Prometheus scrapes a real controller whose job really trains; every rule and query meets its series."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.installed import installed
from harness.live_job import LiveJob
from harness.prometheus import DEPLOY, Prometheus
from harness.raw_job import PATIENT_LIMITS, RawJob
from stretto_controller.metrics import COUNTER, FAMILIES, HISTOGRAM
from stretto_proto.v1 import types_pb2 as types

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
_VARIABLES = {"$training_job": "job", "$__rate_interval": "10s", "$__range": "10m", "$__interval": "10m"}
# This job's rule is adascale; test_the_panels_of_adasum_get_data has the others.
_OF_OTHER_RULES = {"stretto_adasum_orthogonality_ratio"}
_SELECTOR = re.compile(r"stretto[_:][a-z_:]*(?:\{[^}]*\})?")


@dataclass(frozen=True)
class Watched:
    """A job of two nodes that has seen a growth, a loss and a pause with its checkpoint."""

    controller: ControllerProcess
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("watched")
    with (
        ControllerProcess(directory, STRETTO_SERVICE_REVIEW_INTERVAL_S="0.5") as controller,
        Prometheus(directory / "prometheus", controller.http.removeprefix("http://")) as prometheus,
        Agents(directory / "agents", controller.grpc, nnodes="1:3") as agents,
    ):
        job = LiveJob(directory, controller, agents, target_tau=1e6, checkpoint_steps=10)
        job.pace(0.05)
        job.start("n0")
        agents.wait_for_steps("n0", world_size=1)
        job.start("n1")
        generation = agents.wait_for_steps("n0", "n1", world_size=2)
        agents.kill_node("n1")
        job.until(lambda: bool(job.steps_since(generation)), "training did not go on")
        job.start("n2")
        agents.wait_for_steps("n0", "n2", world_size=2)
        prometheus.until(lambda: prometheus.query("stretto_checkpoint_seconds_count > 0"), "no checkpoint was seen")
        prometheus.until(lambda: prometheus.query("stretto_straggler_ratio"), "no worker told its pace")
        prometheus.until(
            lambda: len(prometheus.query("stretto_reconfigure_seconds_count > 0")) == 2, "a change was not seen"
        )
        prometheus.until(lambda: prometheus.query("stretto_recommended_nodes"), "no size was recommended")
        prometheus.until(lambda: prometheus.query("rate(stretto_steps_total[5s]) > 0"), "no rate was seen")
        yield Watched(controller, prometheus)


def _names() -> set[str]:
    """Every name that a query may use: those of the code, and what rules record."""
    names = set[str]()
    for family in FAMILIES:
        suffixes = ("_bucket", "_sum", "_count") if family.kind == HISTOGRAM else ("",)
        names |= {f"{family.name}{suffix}" for suffix in suffixes}
    return names


def test_every_name_is_scraped_with_its_type_and_help(watched: Watched) -> None:
    told = watched.prometheus.get("metadata")
    for family in FAMILIES:
        # Prometheus asks for OpenMetrics, where a counter's family has no suffix.
        name = family.name.removesuffix("_total") if family.kind == COUNTER else family.name
        (entry,) = told.get(name) or told[family.name]
        assert entry["type"] == family.kind
        assert family.help in entry["help"]
    for name in sorted(_names() - _OF_OTHER_RULES):
        # The straggler's is there only while workers say how they get on.
        watched.prometheus.until(lambda n=name: watched.prometheus.query(n), f"a live job has no series of {name}")


def test_the_training_job_keeps_its_label_beside_the_scrape_job(watched: Watched) -> None:
    (series,) = watched.prometheus.query("stretto_tau_iterations")
    assert series["metric"]["training_job"] == "job"
    assert series["metric"]["job"] == "stretto-controller"
    # The latest scrape may be from before the last node came.
    watched.prometheus.until(
        lambda: bool(watched.prometheus.query('stretto_world_size{training_job="job"} == 2')),
        "two workers were not seen",
    )
    assert watched.prometheus.value("count(count by (training_job) (stretto_phase))") == 1


def test_the_story_shows_in_the_counters(watched: Watched) -> None:
    for reason in ("node_lost", "grow"):
        changes = f'stretto_generation_changes_total{{reason="{reason}"}} >= 1'
        watched.prometheus.until(lambda c=changes: watched.prometheus.query(c), f"no change was seen: {reason}")
    assert watched.prometheus.value("stretto_checkpoint_bytes") > 0
    assert watched.prometheus.value("stretto_controller_leader") == 1


def test_rules_load_evaluate_and_are_silent_about_a_healthy_job(watched: Watched) -> None:
    def rules() -> list[Any]:
        return [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]

    watched.prometheus.until(lambda: all(rule["health"] == "ok" for rule in rules()), f"unhealthy: {rules()}")
    assert len(rules()) == 9
    firing = [rule["name"] for rule in rules() if rule.get("state") == "firing"]
    assert firing == []


def _check_selectors(watched: Watched, expression: str, known: set[str]) -> None:
    """Every selector names what the code has, and finds series."""
    for selector in _SELECTOR.findall(expression):
        name = selector.partition("{")[0]
        assert name in known, f"{expression} uses {name}, which nothing exports"
        watched.prometheus.until(
            lambda s=selector: watched.prometheus.query(s), f"{expression}: {selector} finds nothing"
        )


def test_every_rule_reads_series_that_a_live_job_has(watched: Watched) -> None:
    rules = [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    for name in recorded:
        watched.prometheus.until(lambda name=name: watched.prometheus.query(name), f"{name} was never recorded")
    for rule in rules:
        _check_selectors(watched, rule["query"], _names() | recorded)


def _dashboard_queries() -> list[tuple[str, str]]:
    """(where, PromQL) of every panel and annotation, with Grafana's variables filled in."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        targets = [(panel["title"], target) for panel in board["panels"] for target in panel.get("targets", [])]
        targets += [(annotation["name"], annotation) for annotation in board["annotations"]["list"]]
        for title, target in targets:
            expression = target["expr"]
            for variable, value in _VARIABLES.items():
                expression = expression.replace(variable, value)
            assert "$" not in expression, f"{path.name}, {title}: a variable in {expression} is not known"
            found.append((f"{path.stem}: {title}: {target.get('legendFormat', '')}", expression))
    return found


def test_every_query_of_every_dashboard_gets_data(watched: Watched) -> None:
    recorded = {"stretto:added_scale_worth:ratio"}
    queries = _dashboard_queries()
    assert len(queries) > 50
    for where, expression in queries:
        for name in re.findall(r"stretto[_:][a-z_:]*", expression):
            assert name in _names() | recorded, f"{where}: nothing exports {name}"
        if any(name in expression for name in _OF_OTHER_RULES):
            continue
        # Some look at the latest seconds: what they wait for comes with the next scrape.
        watched.prometheus.until(lambda e=expression: watched.prometheus.query(e), f"{where}: no data: {expression}")


def test_the_panels_of_adasum_get_data(tmp_path: Path) -> None:
    """From a job whose workers report as those under an Adasum rule do."""
    with (
        ControllerProcess(tmp_path, **PATIENT_LIMITS) as controller,
        Prometheus(tmp_path / "prometheus", controller.http.removeprefix("http://")) as prometheus,
        RawJob(controller) as job,
    ):
        worker = job.pair()[0]
        progress = types.Progress(generation=worker.generation, step=11, tau=11.0, orthogonality=[0.5, 0.75, 1.0])
        worker.say(progress=progress)
        queries = [
            expression for _, expression in _dashboard_queries() if any(n in expression for n in _OF_OTHER_RULES)
        ]
        for expression, value in zip(queries, (0.5, 0.75, 1.0), strict=True):
            wanted = expression.replace('"job"', '"a"') + f" == {value}"
            prometheus.until(lambda e=wanted: prometheus.query(e), f"no data: {wanted}")


def test_every_alert_has_its_runbook_and_every_runbook_its_alert(watched: Watched) -> None:
    rules = [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]
    pages = {rule["name"]: ROOT / rule["annotations"]["runbook_url"] for rule in rules if rule["type"] == "alerting"}
    for alert, page in pages.items():
        assert f"Alert `{alert}`." in page.read_text(), page
    assert set(pages.values()) == set((ROOT / "docs" / "runbooks").glob("*.md"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", str(DEPLOY / "prometheus.yml")),
        ("check", "rules", str(DEPLOY / "rules" / "stretto.yml")),
        ("test", "rules", str(ROOT / "tests" / "prometheus" / "alerts.yml")),
    ],
    ids=" ".join,
)
def test_promtool_finds_no_fault(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([installed("promtool"), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_can_read_the_metrics_page(watched: Watched) -> None:
    with urllib.request.urlopen(f"{watched.controller.http}/metrics", timeout=60) as response:
        text = response.read()
    done = subprocess.run([installed("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=60)
    # 3: it would have other names, with base units; names are fixed, so only faults of syntax count.
    assert done.returncode in (0, 3), done.stderr
    assert b"error" not in done.stderr.lower(), done.stderr
