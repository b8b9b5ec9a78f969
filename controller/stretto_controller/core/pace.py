"""Whom the others wait for: pure judgements on what live workers say of the step under way (in-process mode).

A step needs every worker. One that waits says since when; those that do not wait hold it up. Heartbeats are far apart
beside steps, so a report counts only while it is fresh, and only if it shows a wait that is long already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobState, Live, Phase, Record, WorkerSession

# Heartbeats; an answer that is later than this is silence.
_LATE_HEARTBEATS = 1.5


@dataclass(frozen=True, slots=True)
class Lag:
    """A worker that holds the others up."""

    worker: WorkerSession
    step: int
    # Since when others are known to wait for it.
    since_s: float
    # A usual step of theirs; 0 if not known.
    median_step_s: float
    # When that is worth a word; None: not as things are known, or it was said.
    slow_s: float | None
    # When its node's workers are to be ended; None: not as things are known.
    hung_s: float | None


def lags(state: JobState, limits: Limits) -> list[Lag]:
    """Who holds up the step under way, and when that has consequences."""
    workers = _in_work(state)
    if not any(w.pace.waiting_s > 0 for w in workers):
        return []
    step = _under_way(state.live, workers)
    waiting = [w for w in workers if w.pace.step == step and w.pace.waiting_s > 0]
    witness = _witness(waiting)
    if witness is None:
        return []
    known = {w.session_id for w in waiting}
    return [_lag(worker, witness, step, limits) for worker in workers if worker.session_id not in known]


def stuck_s(worker: WorkerSession, limits: Limits) -> float:
    """When a worker that is told of its generation's end counts as hung if it does not ask for the next."""
    return math.inf if worker.cut_s is None or worker.closed else worker.cut_s + limits.hang_limit_s


def unended_s(state: JobState, limits: Limits) -> float | None:
    """When live workers that have not ended, though the target is reached, count as hung; None: it is not reached."""
    live, record = state.live, state.record
    if not record.in_process or not record.target_reached or record.phase.finished:
        return None
    return max(live.watched_s, live.target_s or 0.0) + limits.end_limit_s


def next_s(state: JobState, limits: Limits) -> float | None:
    """When time alone next makes someone slow, or hung."""
    times = [time_s for lag in lags(state, limits) for time_s in (lag.slow_s, lag.hung_s) if time_s is not None]
    times += [stuck_s(worker, limits) for worker in state.live.workers.values() if worker.cut_s is not None]
    times += [ended_s] if (ended_s := unended_s(state, limits)) is not None else []
    return min(times, default=None)


def straggler_ratio(state: JobState, now_s: float) -> float | None:
    """The longest that a worker is at its own part of a step, over the median step; None while nobody has said.

    As the workers said last. Who was named as slow is at it still, unless its step has ended.
    """
    workers = [worker for worker in _in_work(state) if not worker.closed]
    step = _under_way(state.live, workers)
    medians = [w.pace.median_step_s for w in workers if w.pace.median_step_s > 0]
    if not medians:
        return None
    since_s = [now_s - w.paced_s if w.slow_step == step else 0.0 for w in workers]
    return max(w.pace.working_s + more_s for w, more_s in zip(workers, since_s, strict=True)) / max(medians)


def _in_work(state: JobState) -> list[WorkerSession]:
    """The workers of the running generation, those of nodes that ended well left out."""
    record: Record = state.record
    generation = record.generation
    if not record.in_process or record.phase is not Phase.RUNNING or generation is None:
        return []
    if record.target_reached or state.live.failure_s is not None:
        return []
    nodes = record.nodes
    return [
        worker
        for worker in state.live.workers.values()
        if worker.generation == generation.number and worker.node_id in nodes and not nodes[worker.node_id].succeeded
    ]


def _under_way(live: Live, workers: Sequence[WorkerSession]) -> int:
    """Nobody can be further than one step beyond the latest that is known to be done."""
    return max([live.step + 1, *(w.pace.step for w in workers)])


def _witness(waiting: Sequence[WorkerSession]) -> WorkerSession | None:
    """Who said last that it waits, and waits for longer than its steps usually take."""
    long = [w for w in waiting if w.pace.waiting_s >= w.pace.median_step_s]
    return max(long, key=lambda w: w.paced_s, default=None)


def _lag(worker: WorkerSession, witness: WorkerSession, step: int, limits: Limits) -> Lag:
    late_after_s = _LATE_HEARTBEATS * limits.heartbeat_interval_s
    median_s = witness.pace.median_step_s
    since_s = witness.paced_s - witness.pace.waiting_s
    if worker.pace.step == step and worker.pace.working_s > 0:
        # The wait may have been for somebody else, and over: nobody holds a step up that has yet to begin.
        since_s = max(since_s, worker.paced_s - worker.pace.working_s)
    # What it said before the wait was long says nothing: it may wait itself since.
    behind = worker.pace.generation == worker.generation and worker.paced_s >= since_s + median_s
    known_s = worker.paced_s if behind else worker.paced_s + late_after_s
    slow_after_s = max(limits.slow_factor * median_s, limits.slow_least_s)
    fresh_until_s = witness.paced_s + late_after_s
    slow_s = max(since_s + slow_after_s, known_s)
    # Before its first beat on a new stream nothing is known of it: to be ended for that takes more than a late beat.
    silent_s = worker.paced_s if behind else worker.paced_s + limits.missed_heartbeats * limits.heartbeat_interval_s
    hung_s = max(since_s + max(limits.hang_limit_s, slow_after_s), silent_s)
    said = worker.slow_step == step or median_s == 0
    return Lag(
        worker,
        step,
        since_s,
        median_s,
        slow_s=None if said or slow_s > fresh_until_s else slow_s,
        hung_s=None if hung_s > fresh_until_s else hung_s,
    )
