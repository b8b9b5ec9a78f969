"""What a job bids for nodes that several jobs share: its curve of predicted progress, up to where more do not pay."""

from __future__ import annotations

from collections.abc import Sequence

from stretto_controller.core.goodput.allocation import Bid
from stretto_controller.core.goodput.prediction import SizePrediction
from stretto_controller.core.goodput.situation import interpolated
from stretto_controller.core.model import JobState


def curve(sizes: Sequence[SizePrediction], least: int, most: int, nodes: int, keeping: float) -> tuple[float, ...]:
    """Rates of least to most nodes. keeping: the share of time that a change costs, so that the present size is worth
    as much more.
    """
    rates = (interpolated(sizes, size) for size in range(least, most + 1))
    return tuple(rate * (1 + keeping) if least + i == nodes else rate for i, rate in enumerate(rates))


def bid(state: JobState, keeping: float) -> Bid:
    """A job that nothing is known of yet bids as if twice its least size were twice as fast: it has to be tried."""
    record, recommendation = state.record, state.live.recommendation
    least, autoscale = record.spec.min_nodes, record.autoscale
    nodes = record.wanted_nodes if record.generation is not None else 0
    rates: tuple[float, ...] = tuple(float(size) for size in range(least, min(2 * least, record.spec.max_nodes) + 1))
    if recommendation is not None and recommendation.nodes and recommendation.sizes[0].progress_rate > 0:
        # Where the job's own floor, deadline or cost says enough, more nodes are worth nothing to it.
        most = max(least, recommendation.wish or recommendation.nodes)
        rates = curve(recommendation.sizes, least, most, nodes, keeping)
    return Bid(record.name, least, rates, autoscale.weight, autoscale.priority, nodes)
