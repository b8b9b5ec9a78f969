"""A cumulative histogram, as Prometheus defines it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

# From a step of a toy model to one that hangs: each bound about 2.2 times the last.
STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts observations at or below each bound; the counts never go back."""

    def __init__(self, upper_bounds: Sequence[float] = STEP_BOUNDS_S) -> None:
        if not upper_bounds or any(a >= b for a, b in pairwise(upper_bounds)):
            raise ValueError(f"upper_bounds is {tuple(upper_bounds)}; give at least one, each above the last")
        self.upper_bounds = tuple(upper_bounds)
        self.sum = 0.0
        self._counts = [0] * (len(self.upper_bounds) + 1)

    @property
    def count(self) -> int:
        """All observations, those above the last bound too."""
        return sum(self._counts)

    @property
    def cumulative_counts(self) -> tuple[int, ...]:
        """For each bound, the observations at or below it."""
        return tuple(accumulate(self._counts[:-1]))

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self.upper_bounds, value)] += 1
        self.sum += value
