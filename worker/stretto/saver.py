"""When the trainer saves and what it goes on from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from stretto.checkpoint import Alone, Checkpointer, CheckpointFailed, Conflict, Failed, Fenced, Peers, Saved
from stretto.checkpoint.timetable import Interval, Moment, Timetable

_log = logging.getLogger(__name__)

_AFTER_AN_ERROR_S = 1.0  # a save that is being given up has this long to notice


class Ranks(Peers, Protocol):
    """The generation whose ranks save together."""

    @property
    def number(self) -> int: ...

    @property
    def broken(self) -> bool: ...

    @property
    def restored(self) -> bool: ...


class Saver:
    """Saves at intervals and on demand, at most once per step; does nothing where no checkpoint was asked for.

    `told`: called with each checkpoint that this rank has committed, `warned` with each save that failed.
    """

    def __init__(
        self,
        checkpoint: Checkpointer | str | os.PathLike[str] | None,
        *,
        interval: Interval,
        told: Callable[[Saved], None],
        warned: Callable[[Failed], None],
    ) -> None:
        if checkpoint is not None and not isinstance(checkpoint, Checkpointer):
            checkpoint = Checkpointer(checkpoint, job=os.environ.get("STRETTO_JOB", ""))
        self._files = checkpoint
        self._timetable = Timetable(interval)
        self._told = told
        self._warned = warned
        self._ranks: Ranks | None = None
        self._generation = 0
        self._saved_step = -1
        self._wanted = False
        self._prepared_after: int | None = None  # a step; optimizers have their state then

    def restore(self, state: Mapping[str, Any], generation: int) -> int:
        """Load the newest whole checkpoint into the state's objects; its step, or 0 where there is none. On rank 0.

        With a controller, older generations may save no more from here on.
        """
        files = self._files
        if files is None:
            return 0
        files.join(Alone())
        if generation:
            files.fence(generation)
        found = files.load_latest(dict(state))
        if found is None:
            return 0
        self._saved_step = found.step
        return found.step

    def begin(self, ranks: Ranks, *, step: int, tau: float) -> None:
        """This process is in a new generation, which stands at `step`."""
        first = self._ranks is None
        self._ranks, self._generation = ranks, ranks.number
        self._saved_step = min(self._saved_step, step)
        self._wanted = False
        self._prepared_after = step
        self._timetable.dropped()
        if first or ranks.restored:
            self._timetable.reset(self._moment(step, tau))
        if self._files is not None:
            self._files.join(ranks)

    def due(self, step: int, tau: float) -> bool:
        """A save is to begin after this step. Only rank 0 is ever due."""
        if self._files is None or self._ranks is None or self._ranks.rank or step <= self._saved_step:
            return False
        return self._wanted or self._timetable.due(self._moment(step, tau))

    def start(self, state: Mapping[str, Any], *, step: int, tau: float) -> None:
        """Begin a checkpoint of this step, unless there is one already. On all ranks."""
        if self._files is None:
            return
        self._poll(self._files)
        if self._needed(step):
            self._begin(self._files, state, step, tau, urgent=False)

    def save(self, state: Mapping[str, Any], *, step: int, tau: float) -> None:
        """Write a checkpoint of this step, unless there is one already, and wait for it. On all ranks.

        Raises Fenced for an old generation, CheckpointFailed where it cannot be written.
        """
        files = self._files
        if files is None:
            return
        files.wait(given_up=self._broken)
        self._poll(files)
        if not self._needed(step):
            return
        self._begin(files, state, step, tau, urgent=True)
        files.wait(given_up=self._broken)
        if self._ranks is not None and self._ranks.broken:
            self._ranks.add_up([0])  # says how it broke
        outcome = self._poll(files)
        if isinstance(outcome, Failed):
            raise CheckpointFailed(f"no checkpoint of step {step}: {outcome.reason}") from outcome.error

    def save_at_last(self, state: Mapping[str, Any], *, step: int, tau: float) -> None:
        """Save although this is perhaps not rank 0: nobody else does."""
        if self._files is None:
            return
        self._files.abandon()
        self._files.join(Alone())
        self._ranks, self._saved_step = None, -1
        self.save(state, step=step, tau=tau)

    def settle(self) -> None:
        """Before leaving as planned: hear of what is being written while this generation still counts.

        For settings.leave_wait_s of the checkpointer at most; then it goes on, and nobody hears of it.
        """
        if self._files is not None:
            self._files.wait(self._files.settings.leave_wait_s, given_up=self._broken)
            self._poll(self._files)

    def poll(self, state: Callable[[], Mapping[str, Any]], *, step: int, tau: float) -> None:
        """Between two steps: hear how saves ended, and wait where too much work would depend on one that is running.

        state(): asked for once in each generation, so that there is memory for it before the first save.
        Raises Fenced, Conflict, and CheckpointFailed where too many have failed.
        """
        if self._files is None:
            return
        self._poll(self._files)
        if self._prepared_after is not None and step > self._prepared_after:
            self._prepared_after = None
            self._files.prepare(state())
        first = self._ranks is None or self._ranks.rank == 0
        if first and self._files.busy and self._timetable.must_wait(self._moment(step, tau)):
            self._files.wait(given_up=self._broken)
            self._poll(self._files)

    def abandon(self) -> None:
        """The generation broke: its save may lack the share of a rank that is gone."""
        if self._files is not None:
            self._files.abandon()
            self._timetable.dropped()
            self._saved_step = -1

    def close(self, *, failed: bool) -> None:
        """The end: what is being written is finished first, unless this is an error's way out."""
        if self._files is None:
            return
        if failed:
            self._files.abandon()
            self._files.wait(_AFTER_AN_ERROR_S)
        else:
            self._files.wait(given_up=self._broken)
            self._poll(self._files)

    def _needed(self, step: int) -> bool:
        """Rank 0 knows whether this step is saved: it restored, and hears of every commit. All ranks ask it."""
        needed = int(step != self._saved_step)
        if self._ranks is None:
            return bool(needed)
        return bool(self._ranks.add_up([needed if self._ranks.rank == 0 else 0])[0])

    def _begin(self, files: Checkpointer, state: Mapping[str, Any], step: int, tau: float, *, urgent: bool) -> None:
        moment = self._moment(step, tau)
        self._wanted = not files.begin(
            state, step=step, generation=self._generation, tau=tau, fences=self._generation > 0, urgent=urgent
        )
        if not self._wanted:
            self._saved_step = step
            self._timetable.began(moment)

    def _broken(self) -> bool:
        return self._ranks is not None and self._ranks.broken

    def _poll(self, files: Checkpointer) -> Saved | Failed | None:
        try:
            outcome = files.poll()
        except (Fenced, Conflict):
            self._timetable.failed()
            raise
        if isinstance(outcome, Saved):
            self._timetable.committed(time.monotonic())
            if self._ranks is None or self._ranks.rank == 0:
                self._told(outcome)
        elif isinstance(outcome, Failed):
            self._timetable.failed()
            self._saved_step = -1
            self._warned(outcome)
        return outcome

    @staticmethod
    def _moment(step: int, tau: float) -> Moment:
        return Moment(time.monotonic(), step, tau)


def with_save(wishes: list[float], due: bool) -> list[float]:
    """What a rank wants, to leave and to save, where a save is due besides."""
    leave, save = wishes
    return [leave, max(save, float(due))]
