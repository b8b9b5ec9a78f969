"""Random failures and changes, one after the other, in one job of ours; what each cost, and what became of the data."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from stretto.sample_log import effective_steps, used_exactly_once

from outages.cluster import Cluster, Never, Setup, cluster

LEAST_NODES, MOST_NODES = 3, 4
# Between an event that is over and the next one.
CALM_S = (0.5, 1.5)
CONTROLLER_AFTERMATH_S = 2.0
PARAMETERS = 4096
# A gap between two steps that is longer than so many usual ones is time lost, beyond one usual step.
LOST_FROM_STEPS = 2.0


@dataclass(frozen=True)
class Event:
    """One disturbance. lost_s: the survivors' longest gap between two steps, less a usual step."""

    kind: str
    lost_s: float
    usual_step_s: float


@dataclass(frozen=True)
class Aftermath:
    """What a storm left. failure: why it ended early, if it did; exactly_once: of every finished epoch's samples."""

    events: list[Event]
    wall_s: float
    useful_share: float
    steps: int
    steps_repeated: int
    exactly_once: bool
    failure: str | None


class _Storm:
    """Picks and carries out one event after the other."""

    def __init__(self, job: Cluster, rng: random.Random, limit_s: float) -> None:
        self.events: list[Event] = []
        self._job = job
        self._rng = rng
        self._limit_s = limit_s
        self._kinds: dict[str, Callable[[], float]] = {
            "worker killed": lambda: job.signal_worker(self._anyone(), signal.SIGKILL),
            "worker stopped": lambda: job.signal_worker(self._anyone(), signal.SIGSTOP),
            "node killed": lambda: self._replace(job.kill_node(self._anyone())),
            "node drained": lambda: self._replace(job.drain(self._anyone())),
            "node joins": self._join,
            "controller killed": job.restart_controller,
        }

    def begin(self) -> None:
        started_s = time.monotonic()
        self._replace(started_s)
        self._job.wait_together(started_s, self._limit_s)
        self._calm()

    def next(self) -> Event:
        """Carry out an event and wait until it is over. Raises Never, with the event's kind, if that takes too long."""
        job, timeline = self._job, self._job.timeline
        full = len(job.nodes) >= MOST_NODES
        kind = self._rng.choice([kind for kind in self._kinds if not (full and kind == "node joins")])
        pids = {name: row.pid for name in job.nodes if (row := timeline.last(name)) is not None}
        event_s = self._kinds[kind]()
        try:
            job.wait_together(event_s, self._limit_s)
        except Never as never:
            raise Never(f"event {len(self.events) + 1}, {kind}: {never}") from never
        if kind == "controller killed":
            time.sleep(CONTROLLER_AFTERMATH_S)
        over_s = time.monotonic()
        timeline.update()
        survivors = [
            name for name in job.nodes if (row := timeline.last(name)) is not None and pids.get(name) == row.pid
        ]
        usual_s = timeline.usual_step_s(survivors, event_s)
        lost_s = max(timeline.longest_gap(name, event_s, over_s) for name in survivors) - usual_s
        event = Event(kind, lost_s, usual_s)
        self.events.append(event)
        self._calm()
        return event

    def _anyone(self) -> str:
        return self._rng.choice(self._job.nodes)

    def _join(self) -> float:
        now_s = time.monotonic()
        self._job.start_node()
        return now_s

    def _replace(self, event_s: float) -> float:
        """Start new nodes for those that are missing."""
        while len(self._job.nodes) < LEAST_NODES:
            self._job.start_node()
        return event_s

    def _calm(self) -> None:
        time.sleep(self._rng.uniform(*CALM_S))
        self._job.timeline.update()


def run_storm(
    setup: Setup, count: int, *, limit_s: float, seed: int, pace_s: float, told: Callable[[int, Event], None]
) -> Aftermath:
    """Put a job through so many random events. told: called with each, and its number."""
    with cluster(setup, nnodes=f"1:{MOST_NODES}", parameters=PARAMETERS, pace_s=pace_s, checkpoints=True) as job:
        storm = _Storm(job, random.Random(seed), limit_s)
        failure = None
        try:
            storm.begin()
            for number in range(1, count + 1):
                told(number, storm.next())
        except Never as never:
            failure = job.story(str(never))
        job.timeline.update()
        return _aftermath(job, storm.events, failure)


def _aftermath(job: Cluster, events: list[Event], failure: str | None) -> Aftermath:
    rows = job.timeline.all_rows()
    first_s: dict[int, float] = {}
    for row in rows:
        first_s.setdefault(row.step, row.done_s)
    times_s = sorted(first_s.values())
    gaps_s = [after - before for before, after in pairwise(times_s)]
    usual_s = statistics.median(gaps_s)
    wall_s = times_s[-1] - times_s[0]
    lost_s = sum(gap - usual_s for gap in gaps_s if gap > LOST_FROM_STEPS * usual_s)
    lines = job.samples_path.read_text().splitlines()
    exactly_once = used_exactly_once(lines)
    return Aftermath(
        events=events,
        wall_s=wall_s,
        useful_share=1 - lost_s / wall_s,
        steps=len(effective_steps(lines)) if exactly_once else len(first_s),
        steps_repeated=job.timeline.repeated(times_s[0], times_s[-1]),
        exactly_once=exactly_once,
        failure=failure,
    )
