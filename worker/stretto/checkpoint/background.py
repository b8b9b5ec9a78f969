"""One rank's save, in a thread of its own: it asks no other rank, only the store."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from stretto.checkpoint.commit import Committer
from stretto.checkpoint.errors import Abandoned, reason_of
from stretto.checkpoint.index import failure_name
from stretto.checkpoint.manifest import Manifest
from stretto.checkpoint.name import CheckpointName
from stretto.checkpoint.pace import Pace
from stretto.checkpoint.store import Store

_log = logging.getLogger(__name__)

_NICENESS = 5


@dataclass(frozen=True)
class Saved:
    """A save that succeeded, on rank 0: a checkpoint that is whole. On other ranks: this rank's share is written."""

    step: int
    generation: int
    tau: float
    path: str
    size_bytes: int
    duration_s: float


@dataclass(frozen=True)
class Failed:
    """A save that did not succeed; the checkpoint before it is as it was."""

    step: int
    generation: int
    reason: str
    error: BaseException


class BackgroundSave:
    """Begun when it is made. `outcome`: None until it has ended, and for good where it was abandoned."""

    def __init__(
        self,
        store: Store,
        committer: Committer | None,
        name: CheckpointName,
        rank: int,
        *,
        write: Callable[[], None],
        commit: Callable[[], Manifest | None],
        tau: float,
        pace: Pace,
    ) -> None:
        """write(), commit(): the rank's share, then the whole, at this pace. committer: on rank 0."""
        self.name = name
        self.outcome: Saved | Failed | None = None
        # Of a generation that is over: nobody wants to hear of its end.
        self.stale = False
        self._store = store
        self._committer = committer
        self._rank = rank
        self._write = write
        self._commit = commit
        self._tau = tau
        self._pace = pace
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="stretto-save", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, limit_s: float | None = None) -> bool:
        """Whether it has ended within the limit; it hurries from here on."""
        self._pace.hurry()
        self._thread.join(limit_s)
        return not self.running

    def abandon(self) -> None:
        """Write nothing more, commit nothing; returns at once."""
        self._pace.cancel()

    def _run(self) -> None:
        if self._pace.leisurely:  # where both want a core, training goes first
            with contextlib.suppress(OSError):  # threads that it starts inherit this
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self._write()
            manifest = self._commit()
        except Abandoned:
            self._undo()
            _log.info("the save of step %d was abandoned", self.name.step)
            return
        except Exception as error:  # noqa: BLE001  (handed to the training thread)
            self._undo()
            reason = reason_of(error, self._store.url) if isinstance(error, OSError) else str(error)
            if self._rank and not self._pace.cancelled:
                with contextlib.suppress(Exception):  # rank 0 notices it by its limit, too
                    self._store.write(f"{self.name}/{failure_name(self._rank)}", [reason.encode()])
            self.outcome = Failed(self.name.step, self.name.generation, reason, error)
            return
        self.outcome = Saved(
            step=self.name.step,
            generation=self.name.generation,
            tau=self._tau,
            path=self._store.at(str(self.name)),
            size_bytes=manifest.size_bytes if manifest else 0,
            duration_s=time.monotonic() - self._started_s,
        )

    def _undo(self) -> None:
        """Leave nothing behind; what cannot be deleted has no manifest, so it counts for nothing."""
        if self._committer is not None:
            with contextlib.suppress(Exception):
                self._committer.discard(self.name)
