"""What a job would be like at each size: values that pages, tools and metrics show."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SizePrediction:
    """One size. Rates are in iterations of tau per second."""

    nodes: int
    world_size: int
    # S, and the gain r at it.
    scale: float
    gain: float
    step_seconds: float
    # Its standard error; 0.0 while there are too few points to tell.
    step_seconds_error: float
    progress_rate: float
    # What each node beyond the size before brings, as a share of what a node brings at the smallest size.
    marginal_efficiency: float
    # Workers ran at this size.
    seen: bool
    # More than twice the largest size seen: a guess.
    extrapolated: bool


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The best size as far as is known, and why. nodes 0: none is recommended, as the reason says."""

    nodes: int = 0
    reason: str = ""
    sizes: tuple[SizePrediction, ...] = ()
    # Different (workers, local batch, accumulation) that were observed.
    points: int = 0
    # Until the target at the recommended size; NaN until known.
    remaining_s: float = math.nan
    # Samples per worker and micro-batch, and micro-batches per step, that would make more of the recommended size;
    # 0: the job's own.
    batch_size: int = 0
    accumulation: int = 0
    # What would be recommended if no other job shared the nodes.
    wish: int = 0

    def at(self, nodes: int) -> SizePrediction | None:
        """The prediction for a size; None where there is none."""
        return next((size for size in self.sizes if size.nodes == nodes), None)
