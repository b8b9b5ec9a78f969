"""The controller that is measured: a process of its own, as in real life."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

_START_LIMIT_S = 30.0
_JUDGEMENT_LIMIT_S = 20.0


class Server:
    """Started, killed, started again on the same ports; and what the kernel says of it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.grpc = self.http = "127.0.0.1:0"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Until it serves. Raises RuntimeError with its log when it ends instead."""
        ready, log = self._directory / "ready.json", self._directory / "log"
        ready.unlink(missing_ok=True)
        ports = [endpoint.rpartition(":")[2] for endpoint in (self.grpc, self.http)]
        command = [
            str(Path(sys.executable).with_name("stretto")),
            "controller",
            "--data-dir",
            str(self._directory / "data"),
        ]
        command += ["--grpc-port", ports[0], "--http-port", ports[1], "--ready-file", str(ready)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        started_s = time.monotonic()
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() - started_s > _START_LIMIT_S:
                raise RuntimeError(f"the controller does not serve: {log.read_text()}")
            time.sleep(0.005)
        said = json.loads(ready.read_text())
        self.grpc, self.http = said["grpc"], said["http"]

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def get(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.http}{path}", headers={"Accept": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def judged_s(self, job: str, node_id: str) -> float:
        """When, in wall-clock seconds, the controller called the node lost. Waits until it does."""
        started_s = time.monotonic()
        while time.monotonic() - started_s < _JUDGEMENT_LIMIT_S:
            events = self.get(f"/api/v1/jobs/{job}/events")["events"]
            for event in events:
                if event["kind"] == "node_lost" and event["node_id"] == node_id:
                    return float(event["time_s"])
            time.sleep(0.05)
        raise RuntimeError(f"{job}: {node_id} was not judged lost: {[event['reason'] for event in events[-5:]]}")

    def core_s(self) -> float:
        """Processor seconds so far."""
        values = self._proc("stat").rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self, *, most: bool = False) -> float:
        """Resident memory now, or at its most."""
        wanted = "VmHWM:" if most else "VmRSS:"
        line = next(line for line in self._proc("status").splitlines() if line.startswith(wanted))
        return int(line.split()[1]) / 1000

    def _proc(self, name: str) -> str:
        assert self._process is not None, "the controller does not run"
        return Path(f"/proc/{self._process.pid}/{name}").read_text()
