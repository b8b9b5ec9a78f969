"""One job as the runner keeps it: the state decided, what of it is saved and may be shown, and what waits between."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stretto_controller.core.actions import (
    Action,
    BeginGeneration,
    Decision,
    EndGeneration,
    FirstStep,
    LogEvent,
    ReachTarget,
)
from stretto_controller.core.model import JobState
from stretto_controller.core.report import Progress
from stretto_controller.curve import Curve, Point
from stretto_controller.figures import Figures
from stretto_controller.history import History
from stretto_controller.settings import ServiceLimits
from stretto_controller.snapshot import JobView
from stretto_controller.store.contents import GenerationSummary, Marks, StoredEvent, StoredJob


@dataclass(frozen=True, slots=True)
class Moment:
    """now_s: monotonic seconds; wall_s: for display only."""

    now_s: float
    wall_s: float


@dataclass(slots=True)
class Release:
    """A decision on its way out. saved None: nothing of it needs a save, but earlier ones may."""

    state: JobState
    marks: Marks
    actions: tuple[Action, ...]
    reason: str
    wall_s: float
    events: tuple[StoredEvent, ...] = ()
    generations: tuple[GenerationSummary, ...] = ()
    points: tuple[Point, ...] = ()
    points_anew: bool = False
    saved: asyncio.Future[None] | None = None


class Job:
    """What belongs to one job's name, from its first event until it is forgotten."""

    def __init__(self, name: str, service: ServiceLimits) -> None:
        self.name = name
        # As decided; None before the first decision and once forgotten.
        self.state: JobState | None = None
        self.releases: deque[Release] = deque()
        self.figures = Figures(service.rate_window_s)
        self.curve = Curve(service.kept_points, service.point_interval_s)
        # Set at the next news, and then replaced by a fresh one.
        self.news = asyncio.Event()
        self.logged_reason = ""
        self.ticked_s = 0.0
        # When its next wake-up was planned last; and whether that is about to be done again.
        self.planned_s = -math.inf
        self.plans = False
        self._service = service
        self._shown: JobState | None = None
        self._shown_marks = Marks()
        self._events: deque[StoredEvent] = deque(maxlen=service.kept_events)
        self._generations: dict[tuple[int, int], GenerationSummary] = {}
        self._marks = Marks()
        self._history = History(0, limit=service.kept_generations)
        self._points_saved_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def load(self, stored: StoredJob) -> None:
        """Go on from what was saved."""
        self.state = self._shown = JobState(stored.record)
        self._marks = self._shown_marks = stored.marks
        self.logged_reason = stored.record.reason
        self._events.extend(stored.events)
        self._generations = {summary.key: summary for summary in stored.generations}
        self.curve.load(stored.points)
        self._history = History(stored.record.incarnation, stored.generations, limit=self._service.kept_generations)

    def note(self, decision: Decision, at: Moment, last_sequence: int) -> Release:
        """Measure the decision, put wall-clock times and sequence numbers on its story, and make it the state."""
        previous, state = self.state, decision.state
        record = state.record
        if previous is not None and previous.record.incarnation != record.incarnation:
            self.figures = Figures(self._service.rate_window_s)
            self.curve.clear()
            self._marks = Marks()
        if self._history.incarnation != record.incarnation:
            self._history = History(record.incarnation, limit=self._service.kept_generations)
        checkpoint = record.checkpoint
        if checkpoint is not None and (previous is None or checkpoint is not previous.record.checkpoint):
            self.figures.note_checkpoint(checkpoint)
            self._marks = replace(self._marks, checkpoint_s=at.wall_s)
        progress, ends = state.live.progress, record.phase.finished and not self._marks.finished_s
        if ends:
            self._marks = replace(self._marks, finished_s=at.wall_s)
        if progress is not None and (previous is None or progress is not previous.live.progress):
            self.figures.note_progress(progress, at.now_s)
            self.curve.note(_point(progress, self.figures.rate.value(at.now_s), at.wall_s))
        if progress is not None and ends:
            self.curve.note(_point(progress, self.figures.rate.value(at.now_s), at.wall_s), last=True)
        events = tuple(self._story(decision, at.wall_s, last_sequence))
        points: tuple[Point, ...] = ()
        points_anew = False
        if events or at.now_s - self._points_saved_s >= self._service.points_saved_s:
            self._points_saved_s = at.now_s
            points, points_anew = self.curve.take_unsaved()
        release = Release(
            state,
            self._marks,
            decision.actions,
            decision.reason,
            at.wall_s,
            events,
            tuple(self._rows(decision, at.wall_s)),
            points,
            points_anew,
        )
        self.state = state
        return release

    def show(self, release: Release) -> None:
        """From now on the release may be seen."""
        self._shown = release.state
        self._shown_marks = release.marks
        self._events.extend(release.events)
        for summary in release.generations:
            self._generations[summary.key] = summary
        while len(self._generations) > self._service.kept_generations:
            del self._generations[next(iter(self._generations))]
        if release.events or release.generations or self.state is None:
            self.news.set()
            self.news = asyncio.Event()

    def view(self, now_s: float) -> JobView | None:
        """What may be seen; None until the first decision is saved."""
        if self._shown is None:
            return None
        return JobView(
            self._shown,
            self._shown_marks,
            self.figures,
            now_s,
            tuple(self._events),
            tuple(self._generations.values()),
            self.curve,
        )

    def plan_wake_up(self, wait_s: float | None, wake: Callable[[Job], None]) -> None:
        """Call `wake` after wait_s seconds instead of at the time planned before; None: never."""
        self.cancel_wake_up()
        if wait_s is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, wake, self)

    def cancel_wake_up(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _story(self, decision: Decision, wall_s: float, last_sequence: int) -> Iterator[StoredEvent]:
        lines = (action for action in decision.actions if isinstance(action, LogEvent))
        for sequence, line in enumerate(lines, start=last_sequence + 1):
            yield StoredEvent(sequence, wall_s, line.kind, line.reason, line.node_id, line.generation)

    def _rows(self, decision: Decision, wall_s: float) -> Iterator[GenerationSummary]:
        for action in decision.actions:
            if isinstance(action, BeginGeneration):
                self.figures.note_generation(action.cause)
                yield from self._history.begin(action, wall_s)
            elif isinstance(action, FirstStep):
                self.figures.note_first_step(action.cause, action.pause_s)
                yield from self._history.first_step(action)
            elif isinstance(action, ReachTarget):
                yield from self._history.target_reached(action)
            elif isinstance(action, EndGeneration):
                yield from self._history.end(action, wall_s)


def _point(progress: Progress, rate: float, wall_s: float) -> Point:
    return Point(
        time_s=wall_s,
        generation=progress.generation,
        step=progress.step,
        tau=progress.tau,
        gain=progress.gain,
        scale=progress.scale,
        loss=progress.loss,
        # Of the first group; the others' follow the same schedule more often than not.
        effective_lr=progress.effective_lr[0] if progress.effective_lr else math.nan,
        base_lr=progress.base_lr[0] if progress.base_lr else math.nan,
        progress_rate=rate,
    )
