"""A real Prometheus on this machine, which scrapes a controller and evaluates the rules under deploy/."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.installed import installed

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
# For its start, and for one scrape, on a busy machine.
PATIENCE_S = 60.0


class Prometheus:
    """Scrapes one target each second, and evaluates its rules as often.

    directory: holds its data, its configuration and its log. target: HOST:PORT of the controller's HTTP side.
    """

    def __init__(self, directory: Path, target: str) -> None:
        self._directory = directory
        self._target = target
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._port = _free_port()
        with (self._directory / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)
        self.until(self._ready, "Prometheus did not get ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant vector now. Raises AssertionError, with Prometheus' words, for a bad expression."""
        found = self._get("query", query=expression)
        assert found["resultType"] == "vector", f"{expression} gives a {found['resultType']}"
        series: list[dict[str, Any]] = found["result"]
        return series

    def value(self, expression: str) -> float:
        """Of the one series that an expression has."""
        (series,) = self.query(expression)
        return float(series["value"][1])

    def labels(self, expression: str, label: str) -> set[str]:
        return {series["metric"].get(label, "") for series in self.query(expression)}

    def get(self, what: str) -> Any:
        return self._get(what)

    def until(self, condition: Any, what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self._process is not None
            assert self._process.poll() is None, f"Prometheus ended:\n{self._log}"
            assert time.monotonic() < deadline_s, f"{what}\n{self._log}"
            time.sleep(0.05)

    @property
    def _log(self) -> str:
        return (self._directory / "prometheus.log").read_text(errors="replace")[-5000:]

    def _command(self) -> list[str]:
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(DEPLOY / "rules" / "*.yml")],
            "scrape_configs": [{"job_name": "stretto-controller", "static_configs": [{"targets": [self._target]}]}],
        }
        path = self._directory / "prometheus.yml"
        # JSON is YAML.
        path.write_text(json.dumps(config))
        return [
            installed("prometheus"),
            f"--config.file={path}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters or what}: {error.read().decode(errors='replace')}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
