"""A job's figures over time, kept so that a page opened late, or after a restart, shows the whole run."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Point(NamedTuple):
    """The figures at one moment; those that a diverged run makes may be NaN or infinite. time_s: wall-clock."""

    time_s: float
    generation: float
    step: float
    tau: float
    gain: float
    scale: float
    loss: float
    effective_lr: float
    base_lr: float
    progress_rate: float


class Curve:
    """At most `limit` points of one incarnation, oldest first: the longer it runs, the further apart they are.

    interval_s: the least between two points of one generation. A generation's first point is always kept.
    """

    def __init__(self, limit: int, interval_s: float) -> None:
        self._limit = limit
        self._interval_s = interval_s
        # Numbers side by side: as objects they would take four times the memory.
        self._columns = tuple(array("d") for _ in Point._fields)
        # Points that were taken to be saved; all of them have to be saved anew while it is None.
        self._saved: int | None = 0

    def __len__(self) -> int:
        return len(self._columns[0])

    def load(self, points: Iterable[Point]) -> None:
        """Go on from saved points."""
        for point in points:
            self._append(point)
        self._saved = len(self)

    def clear(self) -> None:
        """A new incarnation has begun."""
        for column in self._columns:
            del column[:]
        self._saved = None

    def note(self, point: Point, *, last: bool = False) -> None:
        """Keep the point if it is far enough from the latest, in order of time whatever the wall clock does.

        last: of the run, which is kept however near it is.
        """
        if len(self):
            before = self._at(len(self) - 1)
            near = point.generation == before.generation and point.time_s - before.time_s < self._spacing_s()
            if near and not last:
                return
            point = point._replace(time_s=max(point.time_s, before.time_s + 0.001))
        self._append(point)
        if len(self) > self._limit:
            for column in self._columns:
                column[:] = column[::2]
            self._saved = None

    def take_unsaved(self) -> tuple[tuple[Point, ...], bool]:
        """Points to save since the last time; and whether they take the place of all that was saved before."""
        anew, first = self._saved is None, self._saved or 0
        self._saved = len(self)
        return tuple(self._at(index) for index in range(first, len(self))), anew

    def columns(self, after_s: float = -math.inf) -> Iterator[tuple[str, array[float]]]:
        """Each figure's name and its values after a time."""
        first = bisect_right(self._columns[0], after_s)
        for name, column in zip(Point._fields, self._columns, strict=True):
            yield name, column[first:]

    @property
    def last_s(self) -> float:
        """The time of the latest point; 0.0 before the first."""
        times = self._columns[0]
        return times[-1] if times else 0.0

    def _at(self, index: int) -> Point:
        return Point(*(column[index] for column in self._columns))

    def _append(self, point: Point) -> None:
        for column, value in zip(self._columns, point, strict=True):
            column.append(value)

    def _spacing_s(self) -> float:
        """Twice what would fill the limit evenly: thinning out halves the number, and new points keep its pace."""
        times = self._columns[0]
        return max(self._interval_s, 2 * (times[-1] - times[0]) / self._limit)
