"""The guardian's own program: `python -I -S guardian_process.py MARK GROUP`, a pipe's read end as stdin.

It waits until the agent is gone. If the agent did not say goodbye first, it kills every process that carries the
agent's mark in its environment, until none is left. It imports next to nothing, so that it starts in a few
milliseconds and stays small. GROUP is the agent's own process group.
"""

import os
import signal
import sys
import time

GOODBYE = b"."
# Between two looks at the process table.
LOOK_AGAIN_S = 0.02
# So many looks in a row must find nobody: a process that forks and ends between listing and looking is missed.
QUIET_LOOKS = 5
# Processes that survive SIGKILL for so long hang in the kernel; nothing more can be done for them.
GIVE_UP_S = 30.0


def kill_carriers(entry: bytes, agent_group: int) -> None:
    """SIGKILL to every process that carries `entry` (NAME=value) in its environment, until none is left."""
    deadline_s = time.monotonic() + GIVE_UP_S
    quiet = 0
    while quiet < QUIET_LOOKS and time.monotonic() < deadline_s:
        quiet = 0 if _kill_those_found(entry, agent_group) else quiet + 1
        time.sleep(LOOK_AGAIN_S)


def _kill_those_found(entry: bytes, agent_group: int) -> bool:
    found = False
    # Backwards: the youngest are looked at right after they were listed, before they can fork and end.
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            # Opened before the environment is read: a number that is given to another process does no harm.
            if pid != os.getpid() and entry in _environment(pid):
                found = True
                _kill(pid, pidfd, agent_group)
        except OSError:
            # It has just ended.
            pass
        finally:
            os.close(pidfd)
    return found


def _kill(pid: int, pidfd: int, agent_group: int) -> None:
    """Kill a worker and its process group, which torch makes for each: the kernel lets no fork escape from that."""
    group = os.getpgid(pid)
    if group != agent_group:
        os.killpg(group, signal.SIGKILL)
    else:
        # A worker that shares the agent's group shares it with whatever the user's shell put there.
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _environment(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        # Gone, a zombie, or another user's.
        return []


def main() -> None:
    while said := os.read(0, 1):
        if said == GOODBYE:
            return
    kill_carriers(os.fsencode(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
