"""What is measured about a job while the controller runs: rates, counters and histograms for pages and metrics."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from itertools import accumulate

from stretto_controller.core.model import Cause
from stretto_controller.core.report import Checkpoint, Histogram, Progress

DECISION_BOUNDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
RECONFIGURE_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 45.0, 90.0)
CHECKPOINT_BOUNDS = (0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)

_UNPLANNED = (Cause.NODE_LOST, Cause.WORKER_FAILED)


class Observations:
    """A histogram that this process fills."""

    def __init__(self, upper_bounds: Sequence[float]) -> None:
        self._upper_bounds = tuple(upper_bounds)
        self._counts = [0] * (len(self._upper_bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._upper_bounds, value)] += 1
        self._sum += value

    @property
    def histogram(self) -> Histogram:
        cumulative = tuple(accumulate(self._counts))
        return Histogram(self._upper_bounds, cumulative[:-1], cumulative[-1], self._sum)


class CountedSteps:
    """Counters that only grow, from figures that start again when workers restart or go back to a checkpoint."""

    def __init__(self) -> None:
        self.steps = 0
        self.samples = 0
        self.step_seconds = Histogram()
        self._latest: Progress | None = None
        self._earlier_workers = Histogram()

    def note(self, progress: Progress) -> None:
        latest, self._latest = self._latest, progress
        # Work done again after a checkpoint counts again: it is work that was done.
        self.steps += max(0, progress.step - (latest.step if latest else 0))
        self.samples += max(0, progress.samples - (latest.samples if latest else 0))
        if latest is not None and progress.step_seconds.count < latest.step_seconds.count:
            self._earlier_workers = self.step_seconds
        self.step_seconds = _added(self._earlier_workers, progress.step_seconds)


def _added(earlier: Histogram, current: Histogram) -> Histogram:
    """Both together; where the bounds differ only the current one can be told."""
    if earlier.upper_bounds != current.upper_bounds:
        return current
    return Histogram(
        current.upper_bounds,
        tuple(a + b for a, b in zip(earlier.cumulative_counts, current.cumulative_counts, strict=True)),
        earlier.count + current.count,
        earlier.sum + current.sum,
    )


class ProgressRate:
    """d(tau)/dt over the latest `window_s` seconds of reports."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        # (monotonic seconds, tau), oldest first: all within the window, and the one before.
        self._reports: deque[tuple[float, float]] = deque()

    def note(self, tau: float, now_s: float) -> None:
        if self._reports and tau < self._reports[-1][1]:
            # Back to a checkpoint: what was before says nothing about what comes.
            self._reports.clear()
        self._reports.append((now_s, tau))
        while len(self._reports) > 2 and self._reports[1][0] <= now_s - self._window_s:
            self._reports.popleft()

    def value(self, now_s: float) -> float:
        """0.0 until two reports are known, and once a window has passed without progress."""
        if len(self._reports) < 2:
            return 0.0
        (first_s, first_tau), (last_s, last_tau) = self._reports[0], self._reports[-1]
        silent_s = now_s - last_s
        if silent_s >= self._window_s:
            return 0.0
        # Between two ordinary reports the rate stands still; a report that is overdue lowers it.
        usual_s = (last_s - first_s) / (len(self._reports) - 1)
        elapsed_s = last_s - first_s + max(0.0, silent_s - 2 * usual_s)
        return (last_tau - first_tau) / elapsed_s if elapsed_s > 0 else 0.0


class Figures:
    """All that is measured about one incarnation of a job."""

    def __init__(self, rate_window_s: float) -> None:
        self.rate = ProgressRate(rate_window_s)
        self.counted = CountedSteps()
        self.changes: Counter[Cause] = Counter()
        self.reconfigure_seconds: dict[str, Observations] = {}
        self.checkpoint_seconds = Observations(CHECKPOINT_BOUNDS)

    def note_progress(self, progress: Progress, now_s: float) -> None:
        self.rate.note(progress.tau, now_s)
        self.counted.note(progress)

    def note_generation(self, cause: Cause) -> None:
        self.changes[cause] += 1

    def note_first_step(self, cause: Cause, pause_s: float) -> None:
        """A generation has committed its first step. The job's very first generation interrupts nothing."""
        if cause is not Cause.START:
            kind = "unplanned" if cause in _UNPLANNED else "planned"
            self.reconfigure_seconds.setdefault(kind, Observations(RECONFIGURE_BOUNDS)).observe(pause_s)

    def note_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoint_seconds.observe(checkpoint.duration_s)

    def remaining_s(self, tau: float, target_tau: float, now_s: float) -> float:
        """Until tau reaches its target at the present rate; NaN while that cannot be told."""
        if target_tau <= 0:
            return math.nan
        if tau >= target_tau:
            return 0.0
        rate = self.rate.value(now_s)
        return (target_tau - tau) / rate if rate > 0 else math.nan
