"""A few worker processes and what a controller would tell them: who is in which generation, and when one is over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from group.member import main
from stretto.group import GroupSettings

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "stretto.group"])  # workers then start in milliseconds, DDP too

PATIENCE_S = 30.0

Entry = Callable[[Connection, GroupSettings], None]


class Process:
    """One worker. Events arrive in order; those that nobody expects fail the test."""

    def __init__(self, settings: GroupSettings, entry: Entry = main) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=entry, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()
        serving = self.expect("serving")
        self.ports = (serving["store"], serving["preflight"])

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def tell(self, do: str, **facts: Any) -> None:
        self._pipe.send({"do": do} | facts)

    def cut(self, generation: int, reason: str) -> None:
        """Have its session thread end this generation."""
        self.tell("cut", generation=generation, reason=reason)

    def expect(self, *events: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the next event, which must be one of these; answers to `cut` are passed over."""
        deadline_s = time.monotonic() + timeout_s
        while self._pipe.poll(max(deadline_s - time.monotonic(), 0)):
            message: dict[str, Any] = self._pipe.recv()
            if message["event"] == "cut" and "cut" not in events:
                continue
            assert message["event"] in events, f"{message} where one of {events} was expected"
            return message
        raise AssertionError(f"process {self.pid} said none of {events} within {timeout_s} s")

    def signal(self, number: int) -> float:
        """Send it; return when."""
        sent_s = time.monotonic()
        os.kill(self.pid, number)
        return sent_s

    def kill(self) -> float:
        sent_s = self.signal(signal.SIGKILL)
        self._process.join()
        return sent_s

    def wait_until_dead(self) -> None:
        self._process.join(PATIENCE_S)
        assert not self._process.is_alive(), f"process {self.pid} lives on"

    def end(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


class Fleet:
    """Processes and the newest generation's number. `entry`: what they run, where that is more than `member`."""

    def __init__(self, size: int, settings: GroupSettings | None = None, *, entry: Entry = main) -> None:
        self._settings = settings or GroupSettings()
        self._entry = entry
        self.generation = 0
        self.processes: list[Process] = []
        for _ in range(size):
            self.add()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()

    def add(self, entry: Entry | None = None) -> Process:
        process = Process(self._settings, entry or self._entry)
        self.processes.append(process)
        return process

    def begin(self, members: Sequence[Process], *, leader: int = 0, faults: dict[int, str] | None = None) -> None:
        """Assign the next generation to these, by rank."""
        self.generation += 1
        ports = [member.ports for member in members]
        for rank, member in enumerate(members):
            member.tell("newest", generation=self.generation)
            member.tell(
                "build",
                generation=self.generation,
                rank=rank,
                members=ports,
                leader=leader,
                fault=(faults or {}).get(rank, ""),
            )

    def form(self, members: Sequence[Process], *, leader: int = 0) -> float:
        """Assign the next generation, wait until all are in it and have reduced once; return when the last had."""
        self.begin(members, leader=leader)
        for member in members:
            member.expect("built")
        return self.first_reduction(members)

    def first_reduction(self, members: Iterable[Process]) -> float:
        members = list(members)
        for member in members:
            member.tell("reduce", numel=3, in_flight=1, rounds=1)
        return max(float(member.expect("reduced")["at_s"]) for member in members)

    def leave(self, members: Iterable[Process]) -> None:
        members = list(members)
        for member in members:
            member.tell("abandon")
        for member in members:
            member.expect("abandoned")

    def figures(self) -> list[dict[str, Any]]:
        """Threads, descriptors and memory of each process, once its reapers are done."""
        for process in self.processes:
            process.tell("figures")
        return [process.expect("figures", timeout_s=60) for process in self.processes]

    def supersede(self, members: Iterable[Process]) -> float:
        """Tell these that a newer assignment exists; return when."""
        said_s = time.monotonic()
        for member in members:
            member.tell("newest", generation=self.generation + 1)
        return said_s


def wait_until_stopped(process: Process) -> None:
    """Return when the kernel says that the process has stopped itself."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        with open(f"/proc/{process.pid}/stat", encoding="ascii") as status:
            if status.read().rpartition(")")[2].split()[0] == "T":
                return
        assert time.monotonic() < deadline_s, f"process {process.pid} does not stop"
        time.sleep(0.002)


def summary(name: str, seconds: Sequence[float]) -> str:
    ms = sorted(1000 * each for each in seconds)
    return f"{name}: median {statistics.median(ms):.1f} ms, worst {ms[-1]:.1f} ms ({len(ms)})"
