"""Several jobs share nodes: how many each gets, so that the weighted sum of log-speedups is largest.

With concave curves, giving the next node to who gains most by it is exact. Where a curve is not (it rises in jumps),
its upper concave envelope is climbed instead; what does not fit at the end is settled by exchanges, and small cases,
where nothing may be lost, by dynamic programming.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# Up to so many (job, nodes, size) the exact answer is cheap: some milliseconds.
_EXACT_UP_TO = 20_000
_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class Bid:
    """What one job would do with nodes. rates: d(tau)/dt with least, least + 1, ... nodes; at least one, above 0."""

    job: str
    least: int
    rates: tuple[float, ...]
    weight: float = 1.0
    priority: int = 0
    # What it has now; 0: nothing.
    nodes: int = 0
    # Weighted log-speedup over the least size, made monotone: nobody is worse off with a node that it need not use.
    values: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.least >= 1, f"{self.job} bids for nothing"
        assert self.rates, f"{self.job} names no size"
        assert self.rates[0] > 0, f"{self.job} does not run with {self.least} nodes"
        best, values = self.rates[0], []
        for rate in self.rates:
            best = max(best, rate)
            values.append(self.weight * math.log(best / self.rates[0]))
        object.__setattr__(self, "values", tuple(values))

    @property
    def most(self) -> int:
        return self.least + len(self.rates) - 1

    def value(self, nodes: int) -> float:
        return self.values[min(nodes, self.most) - self.least]


Allocation = Mapping[str, int]


def total_value(bids: Sequence[Bid], allocation: Allocation) -> float:
    """Sum of the log-speedups of those who have nodes."""
    return math.fsum(bid.value(allocation[bid.job]) for bid in bids if allocation[bid.job])


def allocate(bids: Sequence[Bid], capacity: int) -> dict[str, int]:
    """Nodes by job, their sum at most `capacity`; 0 for a job whose minimum does not fit.

    Minimums come first: by priority, then those that have nodes now, then the order given.
    """
    nodes = {bid.job: 0 for bid in bids}
    free = capacity
    admitted = []
    for bid in sorted(bids, key=lambda bid: (-bid.priority, bid.nodes == 0)):
        if bid.least <= free:
            free -= bid.least
            nodes[bid.job] = bid.least
            admitted.append(bid)
    if sum(len(bid.rates) for bid in admitted) * max(free, 1) <= _EXACT_UP_TO:
        nodes |= _exact(admitted, free)
    else:
        left = _climb(admitted, nodes, free)
        _exchange(admitted, nodes, left)
    return nodes


def _climb(bids: Sequence[Bid], nodes: dict[str, int], free: int) -> int:
    """Give out nodes segment by segment of the envelopes, the steepest first; returns how many are left."""
    waiting: list[tuple[float, int, int]] = []
    segments = [list(pairwise(_envelope(bid.values))) for bid in bids]
    for index, own in enumerate(segments):
        if own:
            heapq.heappush(waiting, (-_slope(bids[index], *own[0]), index, 0))
    while waiting and free > 0:
        _, index, number = heapq.heappop(waiting)
        bid, (start, end) = bids[index], segments[index][number]
        if end - start > free:
            # Not all of the segment fits: what does may be worth something, too. No later segment of this job fits.
            reached = max(range(start, start + free + 1), key=lambda size: (bid.values[size], -size))
            nodes[bid.job], free = bid.least + reached, free - (reached - start)
            continue
        nodes[bid.job], free = bid.least + end, free - (end - start)
        if number + 1 < len(segments[index]):
            heapq.heappush(waiting, (-_slope(bid, *segments[index][number + 1]), index, number + 1))
    return free


def _slope(bid: Bid, start: int, end: int) -> float:
    return (bid.values[end] - bid.values[start]) / (end - start)


def _envelope(values: Sequence[float]) -> list[int]:
    """Indices of the upper concave envelope's corners, up to where nothing is gained any more."""
    corners = [0]
    for index in range(1, len(values)):
        if values[index] <= values[corners[-1]] + _EPSILON:
            continue
        while len(corners) > 1 and _below(values, corners[-2], corners[-1], index):
            corners.pop()
        corners.append(index)
    return corners


def _below(values: Sequence[float], first: int, middle: int, last: int) -> bool:
    """Whether the middle lies on or below the line from the first to the last."""
    rise = (values[middle] - values[first]) * (last - first)
    return rise <= (values[last] - values[first]) * (middle - first) + _EPSILON


def _exchange(bids: Sequence[Bid], nodes: dict[str, int], free: int) -> None:
    """Use what is left, and mend the place where a segment was cut: a few nodes change hands while it pays."""
    by_name = {bid.job: bid for bid in bids}
    for _ in range(8):
        best: tuple[float, str, str, int] | None = None
        # Losses of giving up d nodes, the cheapest donor of each d.
        for count in _COUNTS:
            donors = [
                (bid.value(nodes[bid.job]) - bid.value(nodes[bid.job] - count), bid.job)
                for bid in bids
                if nodes[bid.job] - count >= bid.least
            ]
            cheapest = heapq.nsmallest(2, donors)
            for bid in bids:
                room = bid.most - nodes[bid.job]
                for donor_loss, donor in ((0.0, ""), *cheapest):
                    given = free + (count if donor else 0)
                    if donor == bid.job or not given or not room:
                        continue
                    gained = bid.value(nodes[bid.job] + min(given, room)) - bid.value(nodes[bid.job]) - donor_loss
                    if gained > _EPSILON and (best is None or gained > best[0]):
                        best = (gained, bid.job, donor, count)
        if best is None:
            return
        _, receiver, donor, count = best
        bid = by_name[receiver]
        given = free + (count if donor else 0)
        taken = _needed(bid, nodes[receiver], min(given, bid.most - nodes[receiver]))
        if donor:
            nodes[donor] -= count
        nodes[receiver] += taken
        free = given - taken


_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)


def _needed(bid: Bid, nodes: int, most: int) -> int:
    """The fewest more nodes that bring all that `most` more would."""
    wanted = bid.value(nodes + most)
    return next(more for more in range(most + 1) if bid.value(nodes + more) >= wanted - _EPSILON)


def _exact(bids: Sequence[Bid], free: int) -> dict[str, int]:
    """By dynamic programming over the nodes beyond the minimums."""
    # best[f]: the largest value with at most f nodes; picks[i][f]: what job i takes of them.
    best = [0.0] * (free + 1)
    picks: list[list[int]] = []
    for bid in bids:
        corners = [i for i in range(len(bid.values)) if i == 0 or bid.values[i] > bid.values[i - 1] + _EPSILON]
        grown, taken = best[:], [0] * (free + 1)
        for extra in corners[1:]:
            value = bid.values[extra]
            for left in range(extra, free + 1):
                if best[left - extra] + value > grown[left] + _EPSILON:
                    grown[left], taken[left] = best[left - extra] + value, extra
        best = grown
        picks.append(taken)
    nodes, left = {}, free
    for bid, taken in zip(reversed(bids), reversed(picks), strict=True):
        nodes[bid.job] = bid.least + taken[left]
        left -= taken[left]
    return nodes


def few_changes(
    bids: Sequence[Bid], target: Allocation, capacity: int, *, changes: int, worth: float
) -> dict[str, int]:
    """On the way from what jobs have to the target: at most `changes` jobs change, those that matter most first.

    worth: the target is not worth a change if it is better by less. What must be (more nodes are taken than there are)
    is done whatever it takes, by the changes that cost least.
    """
    now = {bid.job: bid.nodes for bid in bids}
    taken = sum(now.values())
    if taken <= capacity:
        waiting = any(target[bid.job] and not bid.nodes for bid in bids)
        better = total_value(bids, target) - total_value(bids, now)
        if not waiting and better < worth:
            return now
    by_name = {bid.job: bid for bid in bids}
    shrinking = [job for job in now if target[job] < now[job]]
    growing = [job for job in now if target[job] > now[job]]

    def given_up(job: str) -> float:
        """Value lost for each node that is let go."""
        bid, spared = by_name[job], now[job] - target[job]
        return (bid.value(now[job]) - bid.value(target[job])) / spared if target[job] else math.inf

    def gained(job: str) -> float:
        bid = by_name[job]
        return math.inf if not now[job] else bid.value(target[job]) - bid.value(now[job])

    shrinking.sort(key=given_up)
    growing.sort(key=gained, reverse=True)
    nodes, done = dict(now), 0
    while taken > capacity and shrinking:
        job = shrinking.pop(0)
        taken -= nodes[job] - target[job]
        nodes[job], done = target[job], done + 1
    for job in growing:
        if done >= changes:
            break
        needed = target[job] - nodes[job]
        while taken + needed > capacity and shrinking and done + 1 < changes:
            donor = shrinking.pop(0)
            taken -= nodes[donor] - target[donor]
            nodes[donor], done = target[donor], done + 1
        granted = min(needed, capacity - taken)
        if granted > 0 and nodes[job] + granted >= by_name[job].least:
            nodes[job], taken, done = nodes[job] + granted, taken + granted, done + 1
    return nodes
