"""When to save, so that no more than one interval's work is ever done again: pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A save begins so much earlier than it has to be done, in durations of the latest one; at most half an interval.
_MARGIN = 2.0
# Until one has been seen.
_FIRST_GUESS_S = 1.0


@dataclass(frozen=True)
class Interval:
    """None: not by that measure. The first that has passed counts."""

    seconds: float | None = None
    steps: int | None = None
    tau: float | None = None


@dataclass(frozen=True)
class Moment:
    """Where training stands. now_s: monotonic."""

    now_s: float
    step: int
    tau: float


class Timetable:
    """A save that begins at one moment covers the work up to it once it is committed."""

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._covered = self._tried = Moment(0.0, 0, 0.0)
        self._begun: Moment | None = None
        self._latest_s = _FIRST_GUESS_S

    def reset(self, moment: Moment) -> None:
        """The state of this moment is in a checkpoint, or is where a run, or a generation, begins."""
        self._covered = self._tried = moment
        self._begun = None

    def began(self, moment: Moment) -> None:
        self._begun = self._tried = moment

    def committed(self, now_s: float) -> None:
        """The save that was begun last has become a checkpoint."""
        if self._begun is not None:
            self._latest_s = now_s - self._begun.now_s
            self._covered, self._begun = self._begun, None

    def failed(self) -> None:
        """The save that was begun last has come to nothing; the next is due an interval after it began."""
        self._begun = None

    def dropped(self) -> None:
        """The save that was begun last was abandoned; the next is due as if it had not been."""
        self._begun, self._tried = None, self._covered

    def due(self, moment: Moment) -> bool:
        """A save should begin now. Never while one is running."""
        return self._begun is None and any(
            passed >= limit - min(lead, limit / 2) for passed, limit, lead in self._measures(moment, self._tried)
        )

    def must_wait(self, moment: Moment) -> bool:
        """Another step would make more than an interval of work depend on the save that is running."""
        return self._begun is not None and any(
            passed >= limit for passed, limit, _ in self._measures(moment, self._covered)
        )

    def _measures(self, moment: Moment, since: Moment) -> list[tuple[float, float, float]]:
        """What has passed, the limit, and how much of it a save takes, in each measure that counts."""
        passed_s = moment.now_s - since.now_s
        lead_s = _MARGIN * self._latest_s
        each_s = lead_s / passed_s if passed_s > 0 else math.inf
        found = []
        for passed, limit in (
            (passed_s, self._interval.seconds),
            (float(moment.step - since.step), self._interval.steps),
            (moment.tau - since.tau, self._interval.tau),
        ):
            if limit is not None:
                found.append((passed, float(limit), passed * each_s if passed else 0.0))
        return found
