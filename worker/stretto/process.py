"""What a worker's process owes to its agent: to end when the agent ends, and to end quickly when it fails.

A worker that outlives its agent would train on in a world that has gone on without it. What needs Linux does nothing
elsewhere.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import signal
import sys
import threading
import time

AGENT_PID_VARIABLE = "STRETTO_AGENT_PID"
_PR_SET_PDEATHSIG = 1
_failure: BaseException | None = None


def die_with_agent(agent_pid: int) -> None:
    """End this process with SIGKILL as soon as the agent is gone; at once, if it is gone already.

    The kernel sees to it where the agent is the direct parent. Where something stands between the two (a shell),
    a thread watches the agent. An agent that is no ancestor of this process is left to the agent's own guardian.
    """
    if not sys.platform.startswith("linux"):
        return
    if os.getppid() == agent_pid:
        die_with_parent(agent_pid)
    elif agent_pid in _ancestors():
        _watch(agent_pid)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process with SIGKILL when its parent ends, whose id is given to exclude a race."""
    if not sys.platform.startswith("linux"):
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def end_quickly_after(error: BaseException) -> None:
    """If this error ends the interpreter, skip the teardown of its modules: with torch that takes about a second.

    All exit handlers still run. An error that somebody handles changes nothing.
    """
    global _failure
    if _failure is None:
        atexit.register(_skip_teardown)
    _failure = error


def end_without_teardown() -> None:
    """When this process ends, end it without tearing down its modules: torch aborts where an operation is stuck.

    All exit handlers still run. The exit code is 1 after an error that nobody handled, else 0.
    """
    atexit.register(_end_now)


def _skip_teardown() -> None:
    # Set by the interpreter when it has printed an error that nobody handled.
    if _failure is not None and getattr(sys, "last_value", None) is _failure:
        _end_now()


def _end_now() -> None:
    # Registered last, so this runs first: the others are still to run.
    atexit.unregister(_skip_teardown)
    atexit.unregister(_end_now)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(getattr(sys, "last_value", None) is not None))


def process_age_s() -> float:
    """Seconds since this process was started (its interpreter and imports included); 0.0 where it is not known."""
    try:
        with open("/proc/self/stat", "rb") as file:
            started_ticks = int(_stat_fields(file.read())[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError):
        return 0.0


def _watch(agent_pid: int) -> None:
    try:
        agent = os.pidfd_open(agent_pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(agent, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="stretto-agent-watch", daemon=True).start()


def _ancestors() -> list[int]:
    found: list[int] = []
    pid = os.getppid()
    while pid > 1 and pid not in found:
        found.append(pid)
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(_stat_fields(file.read())[1])
        except (OSError, IndexError):
            break
    return found


def _stat_fields(stat: bytes) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on: a command's name may hold spaces and brackets."""
    return stat.rpartition(b")")[2].split()
