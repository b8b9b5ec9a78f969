"""Real processes: workers end with their agent, however it ends, and nobody else does."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e

# An agent in miniature: holds a guardian, starts workers that carry the mark, says their pids, does as it is told.
AGENT = """
import os, subprocess, sys
from stretto.rendezvous.guardian import MARK_VARIABLE, the_guardian
guardian = the_guardian()
guardian.hold()
os.environ[MARK_VARIABLE] = guardian.mark
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE)
print(guardian.pid, guardian.mark, worker.pid, worker.stdout.readline().decode().strip(), flush=True)
for line in sys.stdin:
    exec(line)
"""
SLEEPER = "import time; print(0, flush=True); time.sleep(1000)"
# A worker whose child has its environment, as a DataLoader's has.
PARENT = "import os, time; pid = os.fork(); pid and print(pid, flush=True); time.sleep(1000)"
# A worker that forks all the time: each child forks the next and ends. Within 10 s, so that none runs for ever.
FORKER = """
import os, time
print(0, flush=True)
end = time.monotonic() + 10
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    time.sleep(0.001)
"""


class Agent:
    def __init__(self, worker: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", AGENT, worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.process.stdout is not None
        guardian, self.mark, worker, child = self.process.stdout.readline().split()
        self.guardian, self.worker, self.child = int(guardian), int(worker), int(child)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def end(self, line: str) -> None:
        self.tell(line)
        self.process.wait(10)

    def carriers(self) -> list[int]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if _environment(pid).get("STRETTO_AGENT_MARK") == self.mark]


def _environment(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def seconds_until(condition: Callable[[], bool], limit_s: float = 10.0) -> float:
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < limit_s, f"not within {limit_s} s"
        time.sleep(0.005)
    return time.monotonic() - started_s


def kill_leftovers(agent: Agent) -> None:
    for pid in agent.carriers():
        os.kill(pid, signal.SIGKILL)
    agent.process.wait()


def test_a_killed_agents_worker_ends_at_once() -> None:
    agent = Agent(SLEEPER)
    agent.process.kill()
    took_s = seconds_until(lambda: not alive(agent.worker))
    assert took_s < 1.0
    seconds_until(lambda: not alive(agent.guardian))


def test_the_workers_children_end_too() -> None:
    agent = Agent(PARENT)
    agent.process.kill()
    seconds_until(lambda: not alive(agent.worker) and not alive(agent.child))


def test_a_worker_that_forks_all_the_time_does_not_escape() -> None:
    agent = Agent(FORKER)
    agent.process.kill()
    # Its process group has the first one's number, and is never empty while the chain goes on.
    seconds_until(lambda: group_is_empty(agent.worker), limit_s=5.0)


def test_another_agents_worker_is_left_alone() -> None:
    agent, other = Agent(SLEEPER), Agent(SLEEPER)
    agent.process.kill()
    seconds_until(lambda: not alive(agent.guardian))
    assert alive(other.worker)
    other.process.kill()
    seconds_until(lambda: not alive(other.worker))


def test_an_agent_that_says_goodbye_leaves_running_what_its_workers_left_behind() -> None:
    agent = Agent(SLEEPER)
    agent.end("guardian.release(); sys.exit()")
    seconds_until(lambda: not alive(agent.guardian))
    assert alive(agent.worker)
    kill_leftovers(agent)


def test_an_agent_that_ends_without_a_goodbye_takes_its_workers_along() -> None:
    agent = Agent(SLEEPER)
    agent.end("os._exit(3)")
    seconds_until(lambda: not alive(agent.worker))


def test_a_forked_child_of_the_agent_does_not_keep_the_guardian_waiting() -> None:
    agent = Agent(SLEEPER)
    agent.end("pid = os.fork() or __import__('time').sleep(3); os._exit(0)")
    seconds_until(lambda: not alive(agent.worker), limit_s=2.0)


def test_the_guardian_keeps_no_pipe_of_the_agent_open() -> None:
    agent = Agent(SLEEPER)
    agent.tell("guardian_pid = guardian.pid; os.kill(guardian_pid, 19)")
    agent.tell("os.kill(worker.pid, 9); os._exit(0)")
    agent.process.wait(10)
    # The guardian is stopped, not gone: only its own descriptors could keep the pipe open.
    assert agent.process.stdout is not None
    readable, _, _ = select.select([agent.process.stdout], [], [], 5.0)
    assert readable
    assert agent.process.stdout.read() == ""
    os.kill(agent.guardian, signal.SIGKILL)


def test_a_guardian_that_was_killed_is_replaced_before_workers_start_again() -> None:
    agent = Agent(SLEEPER)
    os.kill(agent.guardian, signal.SIGKILL)
    agent.tell("import time; time.sleep(0.1); guardian.ensure(); print(guardian.pid, flush=True)")
    assert agent.process.stdout is not None
    replacement = int(agent.process.stdout.readline())
    assert replacement != agent.guardian
    agent.process.kill()
    seconds_until(lambda: not alive(agent.worker))
