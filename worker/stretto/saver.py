"""When the trainer saves and what it goes on from. Only rank 0 touches the files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.checkpoint import Checkpointer


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint, as the controller is told of it."""

    step: int
    path: str
    size_bytes: int
    duration_s: float


class Saver:
    """Saves at intervals and on demand, at most once per step; does nothing where no checkpoint was asked for."""

    def __init__(
        self,
        checkpoint: Checkpointer | str | os.PathLike[str] | None,
        *,
        interval_s: float | None,
        interval_steps: int | None,
        told: Callable[[Saved], None],
    ) -> None:
        self._wanted = checkpoint
        self._interval_s = interval_s
        self._interval_steps = interval_steps
        self._told = told
        self._files: Checkpointer | None = None
        self._generation = self._fenced = 0
        self._saved_s = time.monotonic()
        self._saved_step = -1

    def begin(self, generation: int, *, first: bool, step: int) -> None:
        """This process is in a new generation, which stands at `step`; `first`: it is rank 0."""
        self._generation = generation
        self._saved_step = min(self._saved_step, step)
        self._files = self._opened() if first else None

    def restore(self, state: Mapping[str, Any], generation: int) -> int:
        """Load the newest whole checkpoint into the state's objects; its step, or 0 where there is none. On rank 0.

        With a controller, older generations may save no more from here on.
        """
        self._generation = generation
        files = self._opened()
        if files is None:
            return 0
        self._raise_fence(files)
        found = files.load_latest(dict(state))
        if found is None:
            return 0
        self._saved_step = found.step
        return found.step

    def due(self, step: int) -> bool:
        """An interval has passed since the last save. Only rank 0 is ever due."""
        if self._files is None or step <= self._saved_step:
            return False
        steps = step - max(self._saved_step, 0)
        by_steps = self._interval_steps is not None and steps >= self._interval_steps
        by_time = self._interval_s is not None and time.monotonic() - self._saved_s >= self._interval_s
        return by_steps or by_time

    def save(self, state: Mapping[str, Any], *, step: int) -> None:
        """Write a checkpoint of this step, unless there is one already. Raises Fenced for an old generation."""
        if self._files is None or step == self._saved_step:
            return
        started_s = time.monotonic()
        self._raise_fence(self._files)
        path = self._files.save(dict(state), step=step, generation=self._generation)
        self._saved_s = time.monotonic()
        self._saved_step = step
        self._told(Saved(step, str(path), _size_bytes(path), self._saved_s - started_s))

    def save_at_last(self, state: Mapping[str, Any], *, step: int) -> None:
        """Save although this is perhaps not rank 0: nobody else does."""
        self._files = self._opened()
        self.save(state, step=step)

    def _opened(self) -> Checkpointer | None:
        if self._wanted is not None and not isinstance(self._wanted, Checkpointer):
            self._wanted = Checkpointer(self._wanted)
        return self._wanted

    def _raise_fence(self, files: Checkpointer) -> None:
        if self._fenced < self._generation:
            files.fence(self._generation)
            self._fenced = self._generation


def _size_bytes(directory: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(directory))
