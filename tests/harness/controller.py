"""A real `stretto controller` process on free ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

START_LIMIT_S = 30.0
STOP_LIMIT_S = 15.0
STRETTO = str(Path(sys.executable).with_name("stretto"))


class ControllerProcess:
    """Starts, kills and restarts one controller; its ports stay the same over restarts.

    directory: holds its data, its ready file and its log. host: where it runs, as what to put before its command line.
    environment: more STRETTO_... settings.
    """

    def __init__(self, directory: Path, host: Sequence[str] = (), **environment: str) -> None:
        self.directory = directory
        self.data_dir = directory / "data"
        self.log_path = directory / "controller.log"
        self.grpc = ""
        self.http = ""
        self._host = host
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ControllerProcess:
        try:
            self.start()
        except BaseException:
            # Nobody else would: a context that was not entered is not left.
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the controller does not run"
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def ask(self, *arguments: str) -> Any:
        """What `stretto jobs` says to these, on the controller's own host."""
        command = [*self._host, STRETTO, "jobs", *arguments, "--endpoint", self.grpc, "--json"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=START_LIMIT_S).stdout)

    def command(self) -> list[str]:
        grpc_port, http_port = _port(self.grpc), _port(self.http)
        return [
            *(*self._host, STRETTO, "controller", "--data-dir", str(self.data_dir)),
            *("--grpc-port", grpc_port, "--http-port", http_port, "--ready-file", str(self._ready_file)),
        ]

    def start(self) -> None:
        """Start it, on the same ports as before if there was a before, and wait until it serves."""
        self.launch()
        self.await_serving()

    def launch(self) -> None:
        """The first half of `start`, so that several can start at the same time."""
        assert not self.alive(), "the controller runs already"
        self._ready_file.unlink(missing_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env={**os.environ, **self._environment}
            )

    def await_serving(self) -> None:
        assert self._process is not None, "the controller was never launched"
        deadline = time.monotonic() + START_LIMIT_S
        while not self._ready_file.exists():
            assert self.alive(), f"the controller ended at its start:\n{self.log}"
            assert time.monotonic() < deadline, f"the controller did not serve in time:\n{self.log}"
            time.sleep(0.02)
        ready = json.loads(self._ready_file.read_text())
        assert ready["pid"] == self.pid
        self.grpc, self.http = ready["grpc"], ready["http"]

    def signal(self, number: int) -> None:
        assert self._process is not None, "the controller does not run"
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None, "the controller was never started"
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        """kill -9 and start again."""
        self.kill()
        self.start()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None, "the controller was never started"
        self._process.terminate()
        code = self._process.wait(STOP_LIMIT_S)
        self._process = None
        return code

    def get(self, path: str, token: str = "") -> Any:
        """JSON from the HTTP API."""
        return json.loads(self.text(path, token, accept="application/json"))

    def text(self, path: str, token: str = "", accept: str = "text/plain") -> str:
        """What the HTTP API answers."""
        headers = {"Accept": accept, **({"Authorization": f"Bearer {token}"} if token else {})}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.http}{path}", headers=headers), timeout=10
        ) as answer:
            return str(answer.read().decode())

    @property
    def _ready_file(self) -> Path:
        return self.directory / "ready.json"


def _port(endpoint: str) -> str:
    return endpoint.rsplit(":", 1)[1] if endpoint else "0"
