"""Which size is best, and why, in words. What a change costs and how often one may be made is `review`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stretto_controller.core.goodput.autoscale import Autoscale, Goal
from stretto_controller.core.goodput.prediction import SizePrediction
from stretto_controller.core.goodput.situation import Situation

# A deadline is aimed at with so much of the time left over: predictions are that good.
_DEADLINE_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    nodes: int
    reason: str


def choose(situation: Situation, sizes: Sequence[SizePrediction], autoscale: Autoscale, margin: float) -> Choice:
    """The best size for the job's goal. margin: how much better than the present size another has to be.

    Sizes beyond twice the largest seen are not chosen, unless they are wanted already; none beyond the job's share.
    """
    limit = max(2 * situation.largest_seen, situation.nodes)
    # What a person asked for below the share stays possible when the share shrinks: the smallest size always is.
    usable = [s for s in sizes if s.nodes <= min(limit, situation.share)] or [sizes[0]]
    match autoscale.goal:
        case Goal.PROGRESS:
            choice = _fastest(situation, usable, autoscale.efficiency_floor, margin)
        case Goal.COST:
            choice = _cheapest(situation, usable, margin)
        case Goal.DEADLINE:
            choice = _in_time(situation, usable)
    return Choice(choice.nodes, choice.reason + _caveats(situation, usable, sizes, choice.nodes))


def _fastest(situation: Situation, usable: Sequence[SizePrediction], floor: float, margin: float) -> Choice:
    """The largest size up to which all that is added pays. A size above the present one has to clear the floor by the
    margin, one at or below it only falls when it misses the floor by the margin: between the two nothing changes.
    """
    each = usable[0].progress_rate / usable[0].nodes
    best, efficiency = usable[0], 1.0
    refused: tuple[SizePrediction, float] | None = None
    for size in usable[1:]:
        added = (size.progress_rate - best.progress_rate) / (size.nodes - best.nodes) / each if each > 0 else 0.0
        least = floor * (1 + margin if size.nodes > situation.nodes else 1 - margin)
        if added >= min(least, 1.0 - 1e-9):
            best, efficiency, refused = size, added, None
        elif refused is None:
            refused = (size, added)
    now = situation.rate(situation.nodes)
    if best.nodes > situation.nodes:
        rise = f"+{100 * (best.progress_rate / now - 1):.0f} %" if now > 0 else "from nothing"
        return Choice(
            best.nodes,
            f"{_nodes(best.nodes)} instead of {situation.nodes}: d(tau)/dt is predicted at {_rate(best.progress_rate)} "
            f"instead of {_rate(now)} ({rise}), each added node bringing {efficiency:.0%} of what the first bring "
            f"(floor {floor:.0%})",
        )
    if best.nodes < situation.nodes:
        lost = 100 * (1 - best.progress_rate / now) if now > 0 else 0.0
        spared = situation.nodes - best.nodes
        added = (now - best.progress_rate) / spared / each if each > 0 else 0.0
        which = f"the other {spared} bring {added:.0%} each" if spared > 1 else f"the last one brings {added:.0%}"
        why = f"{which} of what the first bring (floor {floor:.0%})"
        if situation.share < situation.nodes:
            why = f"{situation.share} are this job's share of the nodes"
        fall = f"{lost:.0f} % less" if lost >= 0 else f"{-lost:.0f} % more"
        return Choice(
            best.nodes,
            f"{_nodes(best.nodes)} instead of {situation.nodes}: {why}; d(tau)/dt is predicted at "
            f"{_rate(best.progress_rate)} instead of {_rate(now)} ({fall})",
        )
    reason = f"{_nodes(best.nodes)} as now"
    if refused is not None:
        size, added = refused
        more = size.nodes - best.nodes
        reason += (
            f": {more} more would bring {added:.0%}{' each' if more > 1 else ''} of what the first bring"
            f" (floor {floor:.0%}, and {margin:.0%} of it more before anything changes)"
        )
    elif best.nodes == situation.max_nodes:
        reason += ": the job's maximum, and all of them pay"
    else:
        reason += ": all that it may have pay"
    return Choice(best.nodes, reason)


def _cheapest(situation: Situation, usable: Sequence[SizePrediction], margin: float) -> Choice:
    def cost(size: SizePrediction) -> float:
        return size.world_size / size.progress_rate / 3600 if size.progress_rate > 0 else math.inf

    best = min(usable, key=cost)
    now = next((size for size in usable if size.nodes == situation.nodes), None)
    if now is not None and cost(best) > cost(now) * (1 - margin):
        return Choice(
            now.nodes,
            f"{_nodes(now.nodes)} as now: a unit of tau costs {cost(now):.3g} worker-hours, "
            f"and nothing is cheaper by {margin:.0%}",
        )
    instead = f" instead of {cost(now):.3g} with {situation.nodes}" if now is not None else ""
    return Choice(best.nodes, f"{_nodes(best.nodes)}: a unit of tau costs {cost(best):.3g} worker-hours there{instead}")


def _in_time(situation: Situation, usable: Sequence[SizePrediction]) -> Choice:
    """The fewest nodes that reach the target in time; the fastest size if none does."""
    if math.isnan(situation.remaining_tau):
        return Choice(
            situation.nodes, f"{_nodes(situation.nodes)} as now: a deadline needs a target_tau, and none is set"
        )
    left_s = situation.deadline_s

    def needs_s(size: SizePrediction) -> float:
        pause_s = situation.pause_s if size.nodes != situation.nodes else 0.0
        return pause_s + (situation.remaining_tau / size.progress_rate if size.progress_rate > 0 else math.inf)

    for size in usable:
        # The present size may use up the margin: a change back and forth would cost more.
        allowed_s = left_s if size.nodes == situation.nodes else left_s * (1 - _DEADLINE_MARGIN)
        if needs_s(size) <= allowed_s:
            compared = "as now" if size.nodes == situation.nodes else f"instead of {situation.nodes}"
            return Choice(
                size.nodes,
                f"{_nodes(size.nodes)} {compared}: "
                f"the fewest that reach the target in time, in {_time(needs_s(size))} of the {_time(left_s)} left",
            )
    best = max(usable, key=lambda size: size.progress_rate)
    late_s = needs_s(best) - left_s
    late = f"{_time(late_s)} too late" if late_s > 0 else "hardly in time"
    return Choice(best.nodes, f"{_nodes(best.nodes)}: no size is in time; this one, the fastest, is {late}")


def _caveats(
    situation: Situation, usable: Sequence[SizePrediction], sizes: Sequence[SizePrediction], nodes: int
) -> str:
    """What the prediction rests on."""
    chosen = next((size for size in usable if size.nodes == nodes), None)
    count = len({(point.shape.workers, point.shape.local_batch) for point in situation.model.points})
    told = [f"step times fitted to {count} {'size' if count == 1 else 'sizes'}"]
    if situation.assumed:
        told.append("the gradient's noise not known, for one worker cannot measure it, and taken to be large")
    if chosen is not None and chosen.extrapolated:
        told.append(f"{nodes} is beyond twice the largest size seen")
    elif chosen is not None and not chosen.seen:
        told.append(f"{nodes} not seen yet")
    if len(usable) < len(sizes) and usable[-1].nodes == nodes:
        if situation.share < 2 * situation.largest_seen:
            told.append(f"{situation.share} are this job's share of the nodes")
        else:
            told.append(f"more than {usable[-1].nodes} only once larger sizes were seen")
    return f"; {', '.join(told)}"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _rate(rate: float) -> str:
    return f"{rate:.3g}/s"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "for ever"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
