"""The files under deploy/: what they refer to exists, and the dashboards are what their tool writes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BOARDS = {path.stem: json.loads(path.read_text()) for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}


def _yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def test_the_dashboards_are_what_the_tool_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "dashboards.py", tmp_path], check=True, timeout=60)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (DEPLOY / "grafana" / "dashboards").iterdir()}
    assert fresh == kept, "run `make dashboards`"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_titles_units_queries_and_places_of_their_own(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == name
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
            assert panel["targets"]
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, f"{name}: panels lie on each other at {one} and {other}"


def test_dashboards_use_the_data_source_that_is_provisioned_and_link_to_each_other() -> None:
    (source,) = _yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    for board in BOARDS.values():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                assert target["datasource"]["uid"] == source["uid"]
            for link in panel.get("fieldConfig", {}).get("defaults", {}).get("links", []):
                uid = link["url"].removeprefix("/d/").partition("?")[0]
                assert uid in BOARDS
                names = {variable["name"] for variable in BOARDS[uid]["templating"]["list"]}
                assert link["url"].partition("?var-")[2].partition("=")[0] in names


def test_compose_mounts_files_that_exist_and_opens_no_port_beyond_this_machine() -> None:
    compose = _yaml("compose.yaml")
    services = compose["services"]
    assert set(services) == {"controller", "prometheus", "grafana"}
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    build = services["controller"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    lines = (context / build["dockerfile"]).read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]]
    assert all((context / name).exists() for name in copied)


def test_grafana_finds_its_dashboards_where_compose_puts_them() -> None:
    (provider,) = _yaml("grafana/provisioning/dashboards/stretto.yml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in _yaml("compose.yaml")["services"]["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = _yaml("compose.yaml")["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).stem in BOARDS


def test_both_prometheus_files_differ_only_in_the_target() -> None:
    here, there = _yaml("prometheus/prometheus.yml"), _yaml("prometheus/compose.yml")
    assert here["global"] == there["global"]
    assert here["scrape_configs"][0]["job_name"] == there["scrape_configs"][0]["job_name"]
    assert there["scrape_configs"][0]["static_configs"][0]["targets"] == ["controller:8080"]
