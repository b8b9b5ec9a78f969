"""A job of several agents with one worker each, ours or torchrun's, on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.agents import Agents
from harness.controller import ControllerProcess

from outages.timeline import Timeline

HERE = Path(__file__).parent
MAX_RESTARTS = 10_000
POLL_S = 0.05


class Never(Exception):
    """What was waited for did not happen in time."""


@dataclass(frozen=True)
class Setup:
    """Who runs the job. conf: for torchrun's --rdzv-conf. variables: set for its agents."""

    name: str
    ours: bool
    conf: str = ""
    variables: tuple[str, ...] = ()
    stretto_run: bool = False


SETUPS = {
    "c10d": Setup("torchrun", ours=False),
    "tuned": Setup(
        "torchrun tuned",
        ours=False,
        conf="last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3",
        variables=("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",),
    ),
    "torchrun": Setup("ours, torchrun", ours=True, conf="reconfigure=in-process"),
    "run": Setup("ours, stretto run", ours=True, stretto_run=True),
}


class _Agents(Agents):
    def c10d(self, name: str, script: str, *args: str, setup: Setup, store: str) -> None:
        """Start a torchrun with its own rendezvous; the first node hosts the store."""
        conf = ",".join(filter(None, (setup.conf, f"is_host={int(name == 'n0')}")))
        command = [
            *("env", *setup.variables, str(self._bin / "torchrun")),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={store}", "--rdzv-id=recovery"),
            *(f"--rdzv-conf={conf}", f"--max-restarts={MAX_RESTARTS}"),
        ]
        self._start(name, command, script, args, 1)

    def __exit__(self, *error: Any) -> None:
        """Kill the agents, and the workers of torchrun's, which outlive them."""
        super().__exit__(*error)
        mark = f"WORKER_LOG_DIR={self.directory}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)


class Cluster:
    """Starts and disturbs the nodes of one job; `timeline` reads what their workers log."""

    def __init__(self, directory: Path, agents: _Agents, setup: Setup, controller: ControllerProcess | None) -> None:
        """Use `cluster` below."""
        self.setup = setup
        self.controller = controller
        # Those that are meant to train.
        self.nodes: list[str] = []
        self.timeline = Timeline(agents.directory)
        self.samples_path = directory / "samples"
        self.options: dict[str, Any] = {"directory": str(directory)}
        self._agents = agents
        self._store = f"127.0.0.1:{_free_port()}"
        self._started = 0

    def start_node(self) -> str:
        """Add a node and return its name, at once."""
        name = f"n{self._started}"
        self._started += 1
        self.nodes.append(name)
        script = str(HERE / ("train_elastic.py" if self.setup.ours else "train_plain.py"))
        options = json.dumps(self.options)
        if self.setup.stretto_run:
            self._agents.stretto_run(name, script, options, max_restarts=MAX_RESTARTS, reconfigure=None)
        elif self.setup.ours:
            self._agents.torchrun(name, script, options, max_restarts=MAX_RESTARTS, conf=self.setup.conf)
        else:
            self._agents.c10d(name, script, options, setup=self.setup, store=self._store)
        return name

    def kill_node(self, name: str) -> float:
        """kill -9 of agent and worker together, as when a machine goes; returns when."""
        self.nodes.remove(name)
        pid = self._worker_pid(name)
        at_s = time.monotonic()
        self._agents.signal(name, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it may have noticed its agent's death
            os.kill(pid, signal.SIGKILL)
        return at_s

    def signal_worker(self, name: str, number: signal.Signals) -> float:
        """Signal a node's worker alone; returns when."""
        pid = self._worker_pid(name)
        at_s = time.monotonic()
        os.kill(pid, number)
        return at_s

    def drain(self, name: str) -> float:
        """SIGTERM to an agent; returns when."""
        self.nodes.remove(name)
        at_s = time.monotonic()
        self._agents.signal(name, signal.SIGTERM)
        return at_s

    def restart_controller(self) -> float:
        """kill -9, and start it again; returns when it was killed."""
        assert self.controller is not None, "torchrun has no controller"
        at_s = time.monotonic()
        self.controller.restart()
        return at_s

    def leader(self) -> str:
        """The node of rank 0; torchrun's: the one that hosts the rendezvous."""
        if not self.setup.ours:
            return "n0"
        self.timeline.update()
        return next(name for name in self.nodes if (row := self.timeline.last(name)) is not None and row.rank == 0)

    def wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        """Raise Never unless the condition, on an up-to-date timeline, holds in time."""
        deadline_s = time.monotonic() + limit_s
        while True:
            self.timeline.update()
            if condition():
                return
            if time.monotonic() > deadline_s:
                raise Never(f"{what}: not within {limit_s:g} s")
            time.sleep(POLL_S)

    def wait_together(self, since_s: float, limit_s: float) -> None:
        """Until all nodes, and no others, have stepped together after a moment."""
        what = f"{', '.join(self.nodes)} step together"
        self.wait(lambda: self.timeline.together(self.nodes, since_s), limit_s, what)

    def story(self, what: str) -> str:
        """What the agents and the controller printed."""
        return self._agents.story(what) + (
            f"\n--- controller\n{self.controller.log[-4000:]}" if self.controller else ""
        )

    def _worker_pid(self, name: str) -> int:
        self.timeline.update()
        row = self.timeline.last(name)
        assert row is not None, f"{name} has not stepped yet"
        return row.pid


@contextmanager
def cluster(setup: Setup, *, nnodes: str = "1:3", **options: Any) -> Iterator[Cluster]:
    """A job without nodes yet, and a controller for it if it is ours. options: of the training scripts."""
    with TemporaryDirectory(prefix="stretto-recovery-") as path, ExitStack() as stack:
        directory = Path(path)
        controller = stack.enter_context(ControllerProcess(directory)) if setup.ours else None
        agents = _Agents(directory / "logs", controller.grpc if controller else "", nnodes=nnodes)
        stack.enter_context(agents)
        job = Cluster(directory, agents, setup, controller)
        job.options.update(options)
        yield job


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
