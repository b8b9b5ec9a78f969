"""Who gets how many nodes: four policies, from what a controller would know of each job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from stretto_controller.core.goodput.allocation import Bid, allocate, few_changes
from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleMode
from stretto_controller.core.goodput.bids import curve
from stretto_controller.core.goodput.choice import choose
from stretto_controller.core.goodput.measured import Measured
from stretto_controller.core.goodput.situation import Batches, Moments, Situation
from stretto_controller.core.goodput.step_time import fitted
from stretto_controller.core.limits import Limits
from stretto_controller.simulate.trace import TracedJob

_LIMITS = Limits()
# The policies may change so many jobs at one review, and wait for a gain of so much.
_CHANGES = 16
_WORTH = 0.02


@dataclass
class Known:
    """What a controller knows of a job that has arrived and is not done."""

    job: TracedJob
    nodes: int = 0
    tau: float = 0.0
    measured: Measured = field(default_factory=Measured)
    # As measured: with noise, and in the shuffled control another job's.
    moments: Moments = field(default_factory=lambda: Moments(0.0, 0.0))
    changed_s: float = 0.0
    began: bool = False


class Policy(Protocol):
    name: str

    def divide(self, known: Sequence[Known], capacity: int, now_s: float) -> dict[str, int]:
        """Nodes by job; their sum is at most the capacity. known: in order of arrival."""


class Fixed:
    """Each job gets what its owner asked for, or waits: first come, first served, smaller ones may pass."""

    name = "fixed sizes"

    def divide(self, known: Sequence[Known], capacity: int, now_s: float) -> dict[str, int]:
        nodes, free = {}, capacity
        # Who runs goes on; the latest to come makes room when nodes vanish.
        for each in sorted(known, key=lambda k: k.nodes == 0):
            wanted = each.job.fixed_nodes
            nodes[each.job.name] = wanted if wanted <= free else 0
            free -= nodes[each.job.name]
        return nodes


class EqualShares:
    """All jobs get the same, within their limits; what is left over goes to who came first."""

    name = "equal shares"

    def divide(self, known: Sequence[Known], capacity: int, now_s: float) -> dict[str, int]:
        nodes, free = {each.job.name: 0 for each in known}, capacity
        waiting = []
        for each in known:
            if each.job.min_nodes <= free:
                nodes[each.job.name] = each.job.min_nodes
                free -= each.job.min_nodes
                waiting.append(each.job)
        while free > 0 and waiting:
            least = min(nodes[job.name] for job in waiting)
            for job in list(waiting):
                if nodes[job.name] >= job.max_nodes:
                    waiting.remove(job)
                elif nodes[job.name] == least and free > 0:
                    nodes[job.name] += 1
                    free -= 1
        return nodes


@dataclass
class Goodput:
    """This controller's: the fitted model and the gain's moments, `choose` for each job, `allocate` between them.

    by_gain False: throughput-only, which takes samples per second for progress, as if the gain were S.
    """

    name: str = "goodput"
    by_gain: bool = True
    autoscale: Autoscale = field(default_factory=lambda: Autoscale(mode=AutoscaleMode.ACT))

    def divide(self, known: Sequence[Known], capacity: int, now_s: float) -> dict[str, int]:
        # Who changed a moment ago is left alone, unless there are too few nodes for that.
        calm = sum(max(each.nodes, each.job.min_nodes) for each in known) <= capacity
        bids = [self._bid(each, now_s, calm) for each in known]
        target = allocate(bids, capacity)
        return few_changes(bids, target, capacity, changes=_CHANGES, worth=_WORTH)

    def _bid(self, each: Known, now_s: float, calm: bool) -> Bid:
        job = each.job
        if calm and each.nodes and now_s - each.changed_s < job.pause_s / _LIMITS.pause_share:
            return Bid(job.name, each.nodes, (1.0,), job.weight, job.priority, each.nodes)
        situation = self._situation(each)
        if situation is None:
            rates = tuple(float(size) for size in range(job.min_nodes, min(2 * job.min_nodes, job.max_nodes) + 1))
            return Bid(job.name, job.min_nodes, rates, job.weight, job.priority, each.nodes)
        sizes = situation.predictions()
        most = max(job.min_nodes, choose(situation, sizes, self.autoscale, _LIMITS.resize_margin).nodes)
        rates = curve(sizes, job.min_nodes, most, each.nodes, _LIMITS.pause_share)
        return Bid(job.name, job.min_nodes, rates, job.weight, job.priority, each.nodes)

    def _situation(self, each: Known) -> Situation | None:
        model = fitted(each.measured.points)
        if model is None or not each.moments.known:
            return None
        # Without the gain every sample counts the same: noise without end.
        moments = each.moments if self.by_gain else Moments(1e12, 1.0)
        job = each.job
        situation = Situation(
            job.min_nodes,
            job.max_nodes,
            max(each.nodes, job.min_nodes),
            1.0,
            Batches(job.base_batch_size, job.batch_size),
            moments,
            model,
            remaining_tau=job.target_tau - each.tau,
            pause_s=job.pause_s,
        )
        return replace(situation, nodes=min(situation.nodes, job.max_nodes))
