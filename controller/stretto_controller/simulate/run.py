"""One policy on one trace, in simulated time: pure but for the seeded random numbers of its measurements."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stretto_controller.core.goodput.situation import Moments
from stretto_controller.simulate.policies import Known, Policy
from stretto_controller.simulate.trace import Trace, TracedJob

# Relative standard deviations of what a policy is told, of the step time and of the noise.
_STEP_ERROR = 0.1
_NOISE_ERROR = 0.1
_LONGEST_S = 60 * 86400.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace under a policy. By job, in the order of the trace."""

    policy: str
    # From arrival to the end, in seconds.
    completion_s: tuple[float, ...]
    # Completion time over what the job would take alone, always at its best size.
    slowdown: tuple[float, ...]
    worker_hours: float
    # Hours that one node alone would have needed for the same tau.
    work_hours: float
    changes: int
    # (seconds, nodes in use, nodes there, jobs there), at each review.
    load: tuple[tuple[float, int, int, int], ...]

    @property
    def mean_completion_s(self) -> float:
        return statistics.fmean(self.completion_s)

    @property
    def efficiency(self) -> float:
        """tau per worker-hour, as a share of what one worker alone brings."""
        return self.work_hours / self.worker_hours

    @property
    def fairness(self) -> float:
        """Jain's index of the jobs' speeds: 1 when all are slowed down alike, 1/n when one job gets it all."""
        speeds = [1 / each for each in self.slowdown]
        return sum(speeds) ** 2 / (len(speeds) * sum(speed * speed for speed in speeds))

    @property
    def worst_tenth(self) -> float:
        """The slowdown that a tenth of the jobs exceeds."""
        return statistics.quantiles(self.slowdown, n=10)[-1] if len(self.slowdown) > 1 else self.slowdown[0]


class Simulation:
    """Jobs arrive, train, pause when their nodes change, and end; nodes break, vanish and come."""

    def __init__(self, trace: Trace, policy: Policy, *, review_s: float, seed: int, shuffled: bool = False) -> None:
        self._trace = trace
        self._policy = policy
        self._review_s = review_s
        self._rng = random.Random(seed)
        self._known: dict[str, Known] = {}
        self._paused_until_s: dict[str, float] = {}
        self._ended_s: dict[str, float] = {}
        self._worker_s = 0.0
        self._changes = 0
        self._moments_of = {job.name: job for job in trace.jobs}
        if shuffled:
            # Each job is told the moments of another: the same values in the fleet, and nothing about itself.
            jobs = list(trace.jobs)
            order = random.Random(seed).sample(jobs, len(jobs))
            shifted = [*order[1:], order[0]]
            self._moments_of = {job.name: other for job, other in zip(order, shifted, strict=True)}

    def run(self) -> Outcome:
        trace, now_s = self._trace, 0.0
        waiting = list(trace.jobs)
        failures = sorted(trace.failures, key=lambda failure: failure.at_s)
        load = []
        while waiting or self._known:
            assert now_s < _LONGEST_S, f"{self._policy.name} does not come to an end"
            while waiting and waiting[0].arrives_s <= now_s:
                job = waiting.pop(0)
                self._known[job.name] = Known(job)
            while failures and failures[0].at_s <= now_s:
                self._break(failures.pop(0).node, now_s)
            capacity = trace.nodes_at(now_s)
            self._divide(capacity, now_s)
            used = sum(known.nodes for known in self._known.values())
            load.append((now_s, used, capacity, len(self._known)))
            self._train(now_s, now_s + self._review_s)
            now_s += self._review_s
        return self._outcome(load)

    def _divide(self, capacity: int, now_s: float) -> None:
        known = list(self._known.values())
        nodes = self._policy.divide(known, capacity, now_s)
        assert sum(nodes.values()) <= capacity, f"{self._policy.name} gives more nodes than there are"
        for each in known:
            wanted = nodes[each.job.name]
            if wanted != each.nodes:
                # A first start costs the same under every policy, and is not counted.
                if each.began and wanted:
                    self._paused_until_s[each.job.name] = now_s + each.job.pause_s
                    self._changes += 1
                each.began = each.began or wanted > 0
                each.nodes, each.changed_s = wanted, now_s

    def _break(self, node: int, now_s: float) -> None:
        for each in self._known.values():
            if node < each.nodes:
                self._paused_until_s[each.job.name] = now_s + each.job.pause_s
                return
            node -= each.nodes

    def _train(self, from_s: float, until_s: float) -> None:
        for each in list(self._known.values()):
            job, begins_s = each.job, max(from_s, self._paused_until_s.get(each.job.name, 0.0))
            seconds = max(0.0, until_s - begins_s)
            rate = job.rate(each.nodes, each.tau)
            each.tau += rate * seconds
            over_s = (each.tau - job.target_tau) / rate if rate > 0 and each.tau >= job.target_tau else 0.0
            self._worker_s += each.nodes * (until_s - from_s - over_s)
            if each.tau >= job.target_tau:
                self._ended_s[job.name] = until_s - over_s
                del self._known[job.name]
            elif each.nodes and seconds > 0:
                self._measure(each, seconds)

    def _measure(self, each: Known, seconds: float) -> None:
        job = each.job
        step_s = job.step_s(each.nodes)
        told_s = step_s * max(0.1, self._rng.gauss(1.0, _STEP_ERROR))
        each.measured = each.measured.with_steps(
            job.shape(each.nodes), each.nodes, told_s, max(1, min(50, int(seconds / step_s)))
        )
        other = self._moments_of[job.name]
        noise = other.noise(each.tau / job.target_tau * other.target_tau)
        each.moments = Moments(noise * max(0.1, self._rng.gauss(1.0, _NOISE_ERROR)), 1.0)

    def _outcome(self, load: Sequence[tuple[float, int, int, int]]) -> Outcome:
        jobs = self._trace.jobs
        completion_s = tuple(self._ended_s[job.name] - job.arrives_s for job in jobs)
        return Outcome(
            self._policy.name,
            completion_s,
            tuple(taken / best_s(job) for job, taken in zip(jobs, completion_s, strict=True)),
            self._worker_s / 3600,
            sum(job.alone_s for job in jobs) / 3600,
            self._changes,
            tuple(load),
        )


def best_s(job: TracedJob) -> float:
    """How long a job takes alone, always at its best size and without a pause."""
    parts, seconds = 50, 0.0
    for part in range(parts):
        tau = job.target_tau * (part + 0.5) / parts
        rate = max(job.rate(nodes, tau) for nodes in range(job.min_nodes, job.max_nodes + 1))
        seconds += job.target_tau / parts / rate
    return seconds
