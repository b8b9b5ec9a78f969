"""How long a step takes at a size that was not tried: a model fitted to those that were.

    seconds = a * (overhead + sample * b) + [w > 1] * exchange + max(w - 2, 0) * hop

with w workers, a micro-batches of b samples on each. This is Pollux' model (Qiao et al., OSDI 2021, section 3.2) with
its two times added rather than overlapped, so that it is linear and its four coefficients, all >= 0, have one best fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stretto_controller.core.goodput.least_squares import Fit, non_negative

# A point's error cannot be known better than this, however many steps it averages: machines drift.
_LEAST_ERROR = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to take a step: workers, samples of a micro-batch, micro-batches per worker."""

    workers: int
    local_batch: float
    accumulation: int = 1


@dataclass(frozen=True, slots=True)
class Point:
    """The mean duration of a step of one shape, over so many recent steps."""

    shape: Shape
    nodes: int
    step_s: float
    steps: int

    def after(self, step_s: float, steps: int, remembered: int) -> Point:
        """With `steps` more of mean duration step_s; at most so many are remembered, so that old ones fade."""
        before = min(self.steps, max(0, remembered - steps))
        total = before + steps
        mean_s = (self.step_s * before + step_s * steps) / total
        return Point(self.shape, self.nodes, mean_s, total)


def _row(shape: Shape) -> tuple[float, ...]:
    return (
        float(shape.accumulation),
        shape.accumulation * shape.local_batch,
        float(shape.workers > 1),
        float(max(shape.workers - 2, 0)),
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """The fitted model. `points` it rests on; with one it says that every size is as fast as the one seen."""

    overhead_s: float
    sample_s: float
    exchange_s: float
    hop_s: float
    points: tuple[Point, ...]
    # Relative standard deviation of the points around the model; 0.0 while there are not more than coefficients.
    error: float
    fit: Fit

    def seconds(self, shape: Shape) -> float:
        return math.fsum(c * x for c, x in zip(self.fit.coefficients, _row(shape), strict=True))

    def error_s(self, shape: Shape) -> float:
        """Standard error of `seconds`; 0.0 while there are too few points to tell."""
        return self.error * math.sqrt(max(0.0, self.fit.variance_at(_row(shape))))

    @property
    def largest(self) -> int:
        """The most workers that were seen."""
        return max(point.shape.workers for point in self.points)

    def extrapolates(self, workers: int) -> bool:
        """Whether a size is beyond twice the largest seen: then a prediction is a guess."""
        return workers > 2 * self.largest

    def seen(self, shape: Shape) -> bool:
        return any(point.shape == shape for point in self.points)


def fitted(points: Iterable[Point]) -> StepTime | None:
    """The model of the points; None without any. Errors count relative to the duration: noise is a share of it."""
    known = tuple(point for point in points if point.step_s > 0)
    if not known:
        return None
    rows = [[x / point.step_s for x in _row(point.shape)] for point in known]
    fit = non_negative(rows, [1.0] * len(known))
    overhead_s, sample_s, exchange_s, hop_s = fit.coefficients
    return StepTime(overhead_s, sample_s, exchange_s, hop_s, known, _spread(rows, fit), fit)


def _spread(rows: Sequence[Sequence[float]], fit: Fit) -> float:
    free = len(rows) - len(fit.support)
    if free <= 0:
        return 0.0
    squares = math.fsum((1.0 - sum(c * x for c, x in zip(fit.coefficients, row, strict=True))) ** 2 for row in rows)
    return max(_LEAST_ERROR, math.sqrt(squares / free))
