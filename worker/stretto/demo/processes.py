"""The processes of the demonstration: its controller, which is started again when it dies, agents, and helpers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stretto.channel import DEFAULT_PORT
from stretto.errors import Fatal

_HTTP_PORT = 8080
_START_LIMIT_S = 60.0
_RESTART_INTERVAL_S = 0.5
_LOG_TAIL = 2000


class Child:
    """A process that ends with this one, in a session of its own: Ctrl-C is for us. Its output goes to a file."""

    def __init__(self, command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stretto.demo.leash", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # What torch leaves in the directory for temporary files goes away with ours.
                env=_clean_environment() | {"TMPDIR": str(log_path.parent)} | dict(environment or {}),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None if it still runs by then."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of the process and of what it has started directly, as when a machine goes."""
        if self._process.poll() is None:
            children = children_of(self.pid)
            self._process.kill()
            for pid in children:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self._process.wait()

    def log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-_LOG_TAIL:]


class SupervisedController:
    """`stretto controller` on the usual ports, or on free ones where those are taken; always there again.

    Its ports and its data stay the same when it is started again, so nobody has to know.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ready_file = directory / "controller.json"
        self._ports = (_free_or_any(DEFAULT_PORT), _free_or_any(_HTTP_PORT))
        self._started_s = time.monotonic()
        self._child = self._spawn()
        ready = self._await_ready()
        # HOST:PORT for agents, and the URL of the page.
        self.endpoint, self.url = str(ready["grpc"]), str(ready["http"])
        self._ports = (int(self.endpoint.rpartition(":")[2]), int(self.url.rpartition(":")[2]))

    @property
    def child(self) -> Child:
        return self._child

    def ensure(self) -> bool:
        """Start it again if it is gone and nobody else has done so. True if it was started just now."""
        if self._child.exit_code is None or self._answers():
            return False
        if time.monotonic() - self._started_s < _RESTART_INTERVAL_S:
            return False
        self._started_s = time.monotonic()
        self._child = self._spawn()
        return True

    def _spawn(self) -> Child:
        self._ready_file.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-c", "from stretto.cli import main; main()", "controller", "--host", "127.0.0.1"),
            *("--grpc-port", str(self._ports[0]), "--http-port", str(self._ports[1])),
            *("--data-dir", str(self._directory / "controller"), "--ready-file", str(self._ready_file)),
        ]
        return Child(command, self._directory / "controller.log")

    def _await_ready(self) -> dict[str, object]:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not self._ready_file.exists():
            if self._child.exit_code is not None or time.monotonic() > deadline_s:
                self._child.kill()
                raise Fatal(f"the controller did not start; the end of its log:\n{self._child.log_tail()}")
            time.sleep(0.02)
        ready: dict[str, object] = json.loads(self._ready_file.read_text())
        return ready

    def _answers(self) -> bool:
        """Somebody serves on the controller's port: another controller was started in its place."""
        try:
            with socket.create_connection(("127.0.0.1", self._ports[0]), timeout=1.0):
                return True
        except OSError:
            return False


def start_agent(node_id: str, *, endpoint: str, job: str, script: Sequence[str], nodes: str, directory: Path) -> Child:
    """One node: torchrun's own launcher with the stretto backend, and one worker."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=stretto"),
        *(f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}", f"--nnodes={nodes}", "--nproc-per-node=1"),
        *("--rdzv-conf=reconfigure=in-process", "--max-restarts=100", "--monitor-interval=0.1"),
        "--local-addr=127.0.0.1",
        *script,
    ]
    environment = {"STRETTO_NODE": node_id, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return Child(command, directory / f"{node_id}.log", environment)


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that still run."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def _clean_environment() -> dict[str, str]:
    """Ours, without settings that are meant for other jobs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("STRETTO_", "TORCHELASTIC_"))}


def _free_or_any(port: int) -> int:
    """The port, if it is free on this machine's loopback; else 0, which means any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port
