"""The session's stand-in where there is no controller: nobody hears, and SIGTERM means save and go."""

from __future__ import annotations

import os
import threading
from typing import NoReturn

from stretto.progress_report import StepFigures
from stretto.termination import TerminationWatch

_EXIT_CODE = 128 + 15  # as a shell reports a process that SIGTERM ended


class Unattended:
    """Same interface as `Session`, for a training process that no agent of Stretto has started.

    `saves`: there is somewhere to save to, so SIGTERM becomes a request to leave at a step boundary; a worker
    that does not get there within `grace_s` (its peers may be gone) ends all the same. Without it SIGTERM
    keeps its meaning.
    """

    generation = 0
    scale: float | None = None
    connected = False
    draining = False
    fenced: str | None = None
    error: Exception | None = None

    def __init__(self, *, saves: bool, grace_s: float) -> None:
        self.leave_requested = False
        self._grace_s = grace_s
        self._closed = threading.Event()
        self._watch = TerminationWatch(self._on_sigterm) if saves else None
        if self._watch is not None:
            self._watch.start()

    def report(self, figures: StepFigures) -> None:
        """Nobody asks."""

    def checkpoint_committed(
        self, step: int, tau: float, path: str, *, size_bytes: int = 0, duration_s: float = 0.0
    ) -> None:
        """Nobody asks."""

    def checkpoint_failed(self, step: int, reason: str) -> None:
        """Nobody asks."""

    def take_save_wish(self) -> bool:
        """Nobody asks."""
        return False

    def left(self, step: int) -> None:
        """Nobody asks."""

    def finished(self, step: int, tau: float) -> None:
        """Nobody asks."""

    def wait_until_stopped(self) -> NoReturn:
        """The state is saved and SIGTERM came: end this process."""
        raise SystemExit(_EXIT_CODE)

    def failed(self) -> None:
        """After SIGTERM broken collectives are no news: end without noise."""
        if self.leave_requested:
            os._exit(_EXIT_CODE)

    def close(self) -> None:
        """Give SIGTERM back."""
        self._closed.set()
        if self._watch is not None:
            self._watch.stop()

    def _on_sigterm(self) -> None:
        self.leave_requested = True
        if not self._closed.wait(self._grace_s):
            os._exit(_EXIT_CODE)
