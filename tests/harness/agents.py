"""Agents as separate processes, stock torchrun's and `stretto run`'s, and what their workers wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from harness.network import Network

SCRIPTS = Path(__file__).parents[1] / "e2e" / "scripts"
# For one process start and one rendezvous on a busy machine.
PATIENCE_S = 60.0
# Of each agent's output, in the words of a failure.
STORY_LENGTH = 20_000


@dataclass(frozen=True)
class Row:
    """One step of one worker."""

    time_s: float
    pid: int
    node: str
    rank: int
    world_size: int
    generation: int
    restarts: int
    step: int


class Agents:
    """The agents of one job on this machine; those that still run at the end are killed, and so are their workers."""

    def __init__(
        self,
        directory: Path,
        endpoint: str,
        *,
        job: str = "job",
        nnodes: str = "1:3",
        named: bool = False,
        network: Network | None = None,
    ) -> None:
        """named: the controller, too, knows the nodes by the names that the test gives them.

        network: nodes run on its hosts of their names.
        """
        self.directory = directory
        # Whether the script prints its stacks at a SIGUSR1.
        self.tells_stacks = False
        self._network = network
        self._endpoint, self._job, self._nnodes, self._named = endpoint, job, nnodes, named
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._bin = Path(sys.executable).parent
        self._rows: list[Row] = []
        self._read: dict[Path, int] = {}

    def __enter__(self) -> Agents:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def torchrun(
        self,
        name: str,
        script: str,
        *args: str,
        slots: int = 1,
        max_restarts: int = 100,
        conf: str = "reconfigure=restart",
    ) -> None:
        """Start a stock torchrun. conf: for --rdzv-conf."""
        command = [
            *(str(self._bin / "torchrun"), "--rdzv-backend=stretto", f"--rdzv-endpoint={self._endpoint}"),
            *(f"--rdzv-id={self._job}", f"--rdzv-conf={conf}", f"--max-restarts={max_restarts}"),
        ]
        self._start(name, command, script, args, slots)

    def stretto_run(
        self,
        name: str,
        script: str,
        *args: str,
        slots: int = 1,
        max_restarts: int = 0,
        reconfigure: str | None = "restart",
        conf: str = "",
    ) -> None:
        """Start a `stretto run`. reconfigure: None leaves the option out. conf: for --rdzv-conf."""
        command = [
            *(str(self._bin / "stretto"), "run", "--job", self._job, f"--max-restarts={max_restarts}"),
            *(["--endpoint", self._endpoint] if self._endpoint else []),
            *(["--reconfigure", reconfigure] if reconfigure else []),
            *([f"--rdzv-conf={conf}"] if conf else []),
        ]
        self._start(name, command, script, args, slots)

    def _start(self, name: str, command: list[str], script: str, args: tuple[str, ...], slots: int) -> None:
        address, host = "127.0.0.1", list[str]()
        if self._network is not None:
            address, host = self._network.address(name), self._network.command(name)
        command += [f"--nnodes={self._nnodes}", f"--nproc-per-node={slots}", f"--local-addr={address}"]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STRETTO_")},
            "WORKER_LOG_DIR": str(self.directory),
            "WORKER_NODE": name,
            "OMP_NUM_THREADS": "1",
            **({} if self._network else {"GLOO_SOCKET_IFNAME": "lo"}),
            **({"STRETTO_NODE": name} if self._named else {}),
        }
        with (self.directory / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [*host, *command, str(SCRIPTS / script), *args],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def signal_node(self, name: str, number: signal.Signals) -> None:
        """Send a signal to agent and workers together."""
        pids = self.worker_pids(name)
        self._processes[name].send_signal(number)
        for pid in pids:
            # Its agent may just have ended it, for a change that is under way.
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the agent alone."""
        self._processes[name].send_signal(number)

    def kill_worker(self, name: str) -> None:
        """kill -9 of a node's worker, the agent living."""
        os.kill(self.worker_pid(name), signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """kill -9 of agent and workers together, as when a machine goes."""
        self.signal_node(name, signal.SIGKILL)

    def worker_pid(self, name: str) -> int:
        return [row for row in self.rows() if row.node == name][-1].pid

    def worker_pids(self, name: str) -> list[int]:
        """The node's worker processes, by local rank; none while its agent starts new ones."""
        agent, found = self._processes[name].pid, {}
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            # Processes may end while they are looked at.
            with suppress(OSError, KeyError):
                if _parent(pid) == agent:
                    found[int(_environment(pid)["LOCAL_RANK"])] = pid
        return [pid for _, pid in sorted(found.items())]

    def left_over(self) -> list[int]:
        """Processes of this job that still run: agents, workers, and what these have started."""
        own = []
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            with suppress(OSError):
                if _environment(pid).get("WORKER_LOG_DIR") == str(self.directory):
                    own.append(pid)
        return own

    def running(self, name: str) -> bool:
        """The agent has not ended."""
        return self._processes[name].poll() is None

    def exit_code(self, name: str) -> int:
        """Wait for an agent to end."""
        return self._processes[name].wait(PATIENCE_S)

    def output(self, name: str) -> str:
        return (self.directory / f"{name}.out").read_text(errors="replace")

    def rows(self) -> list[Row]:
        """Every worker's steps so far, in the order of time."""
        for path in self.directory.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                # The last line may be half written yet.
                written, _, _ = file.read().rpartition(b"\n")
            if written:
                self._read[path] = self._read.get(path, 0) + len(written) + 1
                self._rows += [Row(**json.loads(line)) for line in written.splitlines()]
        self._rows.sort(key=lambda row: row.time_s)
        return self._rows.copy()

    def wait_for_steps(self, *names: str, world_size: int, newer_than: int = 0, patience_s: float = PATIENCE_S) -> int:
        """Until exactly these nodes step together, in a world of that size; their generation, newer than given."""
        deadline_s = time.monotonic() + patience_s
        while True:
            rows = [row for row in self.rows() if row.generation > newer_than]
            newest = max((row.generation for row in rows), default=0)
            there = [row for row in rows if row.generation == newest]
            if {row.node for row in there} == set(names) and {row.world_size for row in there} == {world_size}:
                return newest
            assert time.monotonic() < deadline_s, self.story(
                f"{names} did not step together in a world of {world_size}"
            )
            time.sleep(0.05)

    def _listening(self) -> list[int]:
        """Workers, and children of theirs, that print their stacks at a SIGUSR1."""
        pids = []
        for pid in self.left_over() if self.tells_stacks else []:
            with suppress(OSError):
                if any(argument.startswith(str(SCRIPTS)) for argument in _arguments(pid)[:3]):
                    pids.append(pid)
        return pids

    def story(self, what: str) -> str:
        """For the words of a failure: what the agents and, where it runs beside them, the controller have said."""
        for pid in self._listening():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.2)
        outputs = [f"--- {name}\n{self.output(name)[-STORY_LENGTH:]}" for name in self._processes]
        log = self.directory.parent / "controller.log"
        said = log.read_text(errors="replace")[-STORY_LENGTH:] if log.exists() else ""
        return "\n".join([what, *outputs, f"--- controller\n{said}"])


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def _parent(pid: int) -> int:
    """The second field after the command's name, which may hold spaces and brackets."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


def _environment(pid: int) -> dict[str, str]:
    """What the process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
