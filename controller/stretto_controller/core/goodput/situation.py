"""What is known of a job when its size is looked at, and what that predicts for other sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stretto_controller.core.goodput.prediction import SizePrediction
from stretto_controller.core.goodput.step_time import Shape, StepTime

# Every size is predicted up to this; beyond it the next is a quarter larger: so a job has some 40 series at most.
_EACH_UP_TO = 16
_GROWTH = 1.25


@dataclass(frozen=True, slots=True)
class Batches:
    """How a step's samples follow from the number of workers. Zero: not said."""

    base: int
    # Samples per worker and micro-batch.
    local: int
    # Over all workers; fixes the scale.
    total: int = 0
    # Micro-batches per worker and step, where `total` does not fix them.
    accumulation: int = 1

    @property
    def known(self) -> bool:
        return self.base > 0 and (self.local > 0 or self.total > 0)

    def shape(self, workers: int) -> Shape:
        if not self.total:
            return Shape(workers, float(self.local), self.accumulation)
        each = self.total / workers
        accumulation = math.ceil(each / self.local) if self.local else 1
        return Shape(workers, each / accumulation, accumulation)

    def scale(self, workers: int) -> float:
        """S with so many workers."""
        shape = self.shape(workers)
        return shape.workers * shape.local_batch * shape.accumulation / self.base


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the gradient at the base batch size: the trace of its covariance, and its squared norm."""

    variance: float
    sqr_norm: float

    @property
    def known(self) -> bool:
        return self.variance > 0 or self.sqr_norm > 0

    def gain(self, scale: float) -> float:
        """r at `scale`, as stretto.gain has it (AdaScale SGD, section 3): from 1 to S, or from S to 1 below it."""
        largest = max(self.variance, self.sqr_norm)
        if largest <= 0:
            return 1.0
        noise, signal = max(self.variance, 0.0) / largest, max(self.sqr_norm, 0.0) / largest
        gain = (noise + signal) / (noise / scale + signal)
        return min(max(gain, min(1.0, scale)), max(1.0, scale))


@dataclass(frozen=True, slots=True)
class Situation:
    """A job as its size is chosen. Durations in seconds; rates in iterations of tau per second."""

    min_nodes: int
    max_nodes: int
    # Wanted now.
    nodes: int
    # Workers of a node, on average.
    slots: float
    batches: Batches
    moments: Moments
    model: StepTime
    # Until the target; NaN without one.
    remaining_tau: float = math.nan
    # What a change of the size costs.
    pause_s: float = 0.0
    # Until the deadline; NaN without one.
    deadline_s: float = math.nan
    # The job's share of the nodes that all share.
    share: int = 2**31
    # The moments are not known: one worker cannot measure them. They are taken for nothing but noise.
    assumed: bool = False

    def workers(self, nodes: int) -> int:
        return max(1, round(nodes * self.slots))

    @property
    def largest_seen(self) -> int:
        """In nodes."""
        return max(point.nodes for point in self.model.points)

    def rate(self, nodes: int) -> float:
        """d(tau)/dt at a size."""
        workers = self.workers(nodes)
        seconds = self.model.seconds(self.batches.shape(workers))
        return self.moments.gain(self.batches.scale(workers)) / seconds if seconds > 0 else 0.0

    def remaining_s(self, nodes: int) -> float:
        """Until the target at a size; NaN without one."""
        rate = self.rate(nodes)
        return self.remaining_tau / rate if rate > 0 else math.nan

    def predictions(self) -> tuple[SizePrediction, ...]:
        """Sizes worth showing, smallest first: min_nodes, max_nodes, the wanted one and those seen among them."""
        sizes = list(self._sizes())
        rates = [self.rate(nodes) for nodes in sizes]
        each = rates[0] / sizes[0]
        predictions = []
        for index, (nodes, rate) in enumerate(zip(sizes, rates, strict=True)):
            workers = self.workers(nodes)
            shape, scale = self.batches.shape(workers), self.batches.scale(workers)
            added = 1.0
            if index and each > 0:
                added = (rate - rates[index - 1]) / (nodes - sizes[index - 1]) / each
            predictions.append(
                SizePrediction(
                    nodes=nodes,
                    world_size=workers,
                    scale=scale,
                    gain=self.moments.gain(scale),
                    step_seconds=self.model.seconds(shape),
                    step_seconds_error=self.model.error_s(shape),
                    progress_rate=rate,
                    marginal_efficiency=added,
                    seen=self.model.seen(shape),
                    extrapolated=self.model.extrapolates(workers),
                )
            )
        return tuple(predictions)

    def _sizes(self) -> Iterator[int]:
        chosen = {self.min_nodes, self.max_nodes, self.nodes}
        chosen |= {point.nodes for point in self.model.points}
        size = self.min_nodes
        while size < self.max_nodes:
            chosen.add(size)
            size = size + 1 if size < _EACH_UP_TO else math.ceil(size * _GROWTH)
        return iter(sorted(size for size in chosen if self.min_nodes <= size <= self.max_nodes))


def better_batches(situation: Situation, nodes: int, *, least_gain: float = 0.05) -> Batches | None:
    """Samples and micro-batches per worker that make more of a size, if any do by `least_gain`.

    Only micro-batches no larger than one that was seen: that much fits into memory. Never where the job fixes its
    global batch size, which is a choice of the learning-rate schedule.
    """
    now = situation.batches
    if now.total:
        return None
    locals_seen = {int(p.shape.local_batch) for p in situation.model.points if p.shape.local_batch >= 1}
    best, best_rate = None, situation.rate(nodes) * (1 + least_gain)
    for local in sorted({now.local, *locals_seen}):
        for accumulation in (1, 2, 4, 8):
            tried = replace(now, local=local, accumulation=accumulation)
            rate = replace(situation, batches=tried).rate(nodes)
            if rate > best_rate:
                best, best_rate = tried, rate
    return best


def interpolated(sizes: Sequence[SizePrediction], nodes: int) -> float:
    """d(tau)/dt at any size between those predicted; the last one's beyond them."""
    before = sizes[0]
    for size in sizes:
        if size.nodes == nodes:
            return size.progress_rate
        if size.nodes > nodes:
            share = (nodes - before.nodes) / (size.nodes - before.nodes)
            return before.progress_rate + share * (size.progress_rate - before.progress_rate)
        before = size
    return before.progress_rate
