"""Workers die with their agent: the agent's side of the guardian process.

torch leaves the workers of a SIGKILLed agent running. The guardian holds the read end of a pipe whose write end
only the agent holds; the kernel closes it however the agent ends, and the guardian ends the workers.
Processes that a worker started and that have the worker's environment count as workers, too.
Not covered: functions as entry points with the start method `fork`, which share the agent's own environment.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path

from stretto.rendezvous.guardian_process import GOODBYE

MARK_VARIABLE = "STRETTO_AGENT_MARK"
_PROGRAM = Path(__file__).with_name("guardian_process.py")


class Guardian:
    """One guardian process, for all who hold it. Thread-safe."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._holders = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        os.register_at_fork(after_in_child=self._forget)

    @property
    def pid(self) -> int | None:
        """The guardian's process id; None while there is none."""
        return self._process.pid if self._process else None

    def hold(self) -> None:
        """From here on workers may be started: start the guardian unless it runs."""
        with self._lock:
            self._holders += 1
            self._ensure()

    def ensure(self) -> None:
        """Start the guardian again if something has ended it; to be called before workers start."""
        with self._lock:
            self._ensure()

    def release(self) -> None:
        """This holder's workers are gone. After the last one the guardian ends, and ends nobody."""
        with self._lock:
            self._holders -= 1
            if self._holders > 0 or self._process is None:
                return
            with contextlib.suppress(BrokenPipeError):
                os.write(self._pipe, GOODBYE)
            os.close(self._pipe)
            self._process.wait()
            self._process, self._pipe = None, -1

    def _ensure(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                return
            os.close(self._pipe)
        reading, self._pipe = os.pipe()
        try:
            # Its own session, no terminal and no pipe of ours: Ctrl-C does not reach it, and whoever reads our
            # output to the end does not wait for it. Its environment does not carry the mark.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM), f"{MARK_VARIABLE}={self.mark}", str(os.getpgrp())],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if k != MARK_VARIABLE},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(reading)

    def _forget(self) -> None:
        """In a forked child: only the agent may hold the pipe's write end."""
        self._lock = threading.Lock()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._process, self._pipe = None, -1


_guardian: Guardian | None = None
_guardian_lock = threading.Lock()


def the_guardian() -> Guardian:
    """This process's guardian, shared by its handlers."""
    global _guardian
    with _guardian_lock:
        if _guardian is None:
            _guardian = Guardian()
        return _guardian
