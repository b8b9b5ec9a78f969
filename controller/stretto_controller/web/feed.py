"""What open pages are told, once per interval: made once for all pages that look at the same thing."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from stretto_controller.core.errors import Rejected
from stretto_controller.runner import Runner
from stretto_controller.snapshot import JobView
from stretto_controller.web import schema
from stretto_controller.web.watch import Watchers

_log = logging.getLogger("stretto.controller")


@dataclass(frozen=True, slots=True)
class Position:
    """What a page has seen of a job: the last event's sequence number, and the latest point's time."""

    sequence: int = 0
    point_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.sequence}/{self.point_s:.3f}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """From a Last-Event-ID that this feed gave; empty: nothing was seen. Raises Rejected."""
        if not text:
            return cls()
        sequence, _, point_s = text.partition("/")
        try:
            if len(text) > 40 or not sequence.isascii() or not sequence.isdigit():
                raise ValueError(text)
            if not math.isfinite(seen := float(point_s)):
                raise ValueError(text)
            return cls(int(sequence), seen)
        except ValueError as error:
            raise Rejected.invalid(f"Last-Event-ID is {text[:40]!r}; give the id that came last, or none") from error


class Feed:
    """The stream behind the page: `fleet` tells which jobs changed, `job` all that is new about one of them."""

    def __init__(self, runner: Runner, watchers: Watchers, interval_s: float) -> None:
        self._runner = runner
        self._watchers = watchers
        self._interval_s = interval_s
        self._tick = asyncio.Event()
        self._number = 0
        self._ticking: asyncio.Task[None] | None = None
        self._followers = 0
        # By job name, as of this tick; and what changed since the one before.
        self._fleet: dict[str, str] = {}
        self._changes = b""
        self._frames: dict[tuple[str, Position], tuple[bytes, Position]] = {}

    def follow(self, job: str | None, seen: Position) -> AsyncIterator[bytes]:
        """Frames for one page. Raises Rejected only before it begins: too many streams, or no such job."""
        if job is not None:
            self._runner.view(job)
        self._watchers.admit()
        return self._follow(job, seen)

    async def _follow(self, job: str | None, seen: Position) -> AsyncIterator[bytes]:
        with self._watchers.counted():
            self._begin()
            try:
                number, first = -1, True
                # A controller that stops lets its pages go, which then look for the next one.
                while self._runner.ready:
                    # One that was slow to read gets the whole list: it missed a change.
                    if self._number == number + 1 and not first:
                        if self._changes:
                            yield self._changes
                    else:
                        yield _frame("fleet", {"whole": True, "jobs": [*self._fleet.values()], "gone": []})
                    number = self._number
                    if job is not None:
                        frame, seen = self._job_frame(job, seen, first)
                        yield frame
                    first = False
                    await self._tick.wait()
            finally:
                self._end()

    def _begin(self) -> None:
        self._followers += 1
        if self._ticking is None:
            self._look()
            self._ticking = asyncio.create_task(self._tick_on())

    def _end(self) -> None:
        self._followers -= 1
        if not self._followers and self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    async def _tick_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                self._look()
            except Exception:  # noqa: BLE001
                # A fault of ours in one job must not freeze every page.
                _log.exception("the jobs could not be shown")
                continue
            self._tick.set()
            self._tick = asyncio.Event()

    def _look(self) -> None:
        """Take up what the jobs are like now."""
        fleet = {view.record.name: schema.brief_text(view) for view in self._runner.views()}
        changed = [text for name, text in fleet.items() if self._fleet.get(name) != text]
        gone = [name for name in self._fleet if name not in fleet]
        self._changes = _frame("fleet", {"whole": False, "jobs": changed, "gone": gone}) if changed or gone else b""
        self._fleet = fleet
        self._frames.clear()
        self._number += 1

    def _job_frame(self, job: str, seen: Position, first: bool) -> tuple[bytes, Position]:
        key = (f"{job} {first}", seen)
        if key not in self._frames:
            try:
                self._frames[key] = _news(self._runner.view(job), seen, first)
            except Rejected:
                self._frames[key] = (_frame("deleted", {}), seen)
        return self._frames[key]


def _news(view: JobView, seen: Position, first: bool) -> tuple[bytes, Position]:
    """All of the job that can change, and what was added since."""
    # It has seen events that are not there: this controller began anew, with an empty data directory.
    anew = first and seen.sequence > (view.events[-1].sequence if view.events else 0)
    if anew:
        seen = Position()
    events = [event for event in view.events if event.sequence > seen.sequence]
    now = replace(seen, point_s=max(seen.point_s, round(view.curve.last_s, 3)))
    if events:
        now = replace(now, sequence=events[-1].sequence)
    # The page has the others, or gets them with the history; the last two may have changed.
    history = view.history if first else view.history[-2:]
    parts = {
        "anew": json.dumps(anew),
        "job": schema.job_out(view).model_dump_json(),
        "events": f"[{','.join(schema.event_out(event).model_dump_json() for event in events)}]",
        "generations": f"[{','.join(schema.summary_out(summary).model_dump_json() for summary in history)}]",
        # Points have milliseconds: one half of them later is surely not the one that was seen.
        "points": schema.points_text(view.curve, seen.point_s + 0.0005),
    }
    data = ",".join(f'"{name}":{text}' for name, text in parts.items())
    return f"id: {now}\nevent: job\ndata: {{{data}}}\n\n".encode(), now


def _frame(event: str, content: dict[str, object]) -> bytes:
    """`jobs` are JSON texts already."""
    jobs = content.pop("jobs", None)
    data = json.dumps(content)
    if isinstance(jobs, list):
        data = f'{data[:-1]},"jobs":[{",".join(jobs)}]}}'
    return f"event: {event}\ndata: {data}\n\n".encode()
