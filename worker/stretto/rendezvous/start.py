"""One start of a node's workers in in-process mode, as their agent sees it until they have ended."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from stretto.rendezvous.guardian_process import kill_carriers
from stretto.rendezvous.sign_in import SIGN_IN_VARIABLE, signed_in

_log = logging.getLogger(__name__)

# Unlike the guardian's mark, different at each start: who is to be killed are the old workers, never the new ones.
START_VARIABLE = "STRETTO_START_MARK"
# torch's agent looks at its workers ten times a second, unless --monitor-interval says otherwise. Workers that it
# finds dead before it has seen that it shall stop them count as failed.
SEEN_LIMIT_S = 5.0

_WHAT_TO_DO = (
    "In in-process mode a script has to train with stretto.ElasticTrainer, or with a live session of its own; one that "
    "does not would train alone on each node. A plain script needs --rdzv-conf=reconfigure=restart on all nodes "
    "(stretto run: --reconfigure restart)"
)


class WorkerStart:
    """Who of the workers has begun a session, and how they are killed. Make it before they start."""

    def __init__(self, slots: int, warn_after_s: float, limit_s: float, *, now_s: float) -> None:
        """warn_after_s: a worker without a session so long after the start is named, and again at twice that time.

        limit_s: then all are killed.
        """
        self._slots = slots
        self._started_s = now_s
        self._warn_after_s = warn_after_s
        self._limit_s = limit_s
        self._mark = secrets.token_hex(16)
        self._directory = Path(tempfile.mkdtemp(prefix="stretto-sign-in-"))
        self._present: set[int] = set()
        self._stop_seen = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """What the workers must find in theirs."""
        return {START_VARIABLE: self._mark, SIGN_IN_VARIABLE: str(self._directory)}

    def watch(self, *, stopping: bool, now_s: float) -> None:
        """The workers run. stopping: torch's agent is being told to stop them. Takes microseconds."""
        if stopping:
            self._stop_seen.set()
        elif len(self._present) < self._slots and (missing := self._missing()):
            silent_s = now_s - self._started_s
            if silent_s >= self._warn_after_s:
                _log.warning(
                    "%s began no session with the controller within %.0f s. %s",
                    _workers(missing),
                    silent_s,
                    _WHAT_TO_DO,
                )
                self._warn_after_s = 2 * silent_s
            if silent_s >= self._limit_s:
                _log.error("%s hung at the start, for %.0f s: ending this node's workers", _workers(missing), silent_s)
                self._limit_s = math.inf
                self.kill()

    def objection(self) -> str | None:
        """Why the workers did not end well although all exited with 0; None if they did."""
        missing = self._missing()
        return f"{_workers(missing)} ended without a session with the controller. {_WHAT_TO_DO}" if missing else None

    def kill(self) -> None:
        """End these workers and their children with SIGKILL, stopped ones too. Returns at once."""
        threading.Thread(target=self._kill, name="stretto-kill", daemon=True).start()

    def close(self) -> None:
        """The workers have ended."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _missing(self) -> list[int]:
        self._present |= signed_in(self._directory)
        return [number for number in range(self._slots) if number not in self._present]

    def _kill(self) -> None:
        if not sys.platform.startswith("linux"):
            # torch's agent does it, 30 s after a SIGTERM.
            return
        self._stop_seen.wait(SEEN_LIMIT_S)
        kill_carriers(os.fsencode(f"{START_VARIABLE}={self._mark}"), os.getpgrp())


def _workers(missing: list[int]) -> str:
    who = "worker" if len(missing) == 1 else "workers"
    return f"{who} {', '.join(map(str, missing))} of this node"
