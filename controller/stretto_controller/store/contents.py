"""What a store keeps, and what the runner asks of one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from stretto_controller.core.model import Cause, Generation, Record
from stretto_controller.curve import Point


class StoreError(Exception):
    """The store cannot be opened, or did not save. The message says what to do."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One line of a job's story. `sequence` is never used twice; `time_s` is wall-clock time, for display."""

    sequence: int
    time_s: float
    kind: str
    reason: str
    node_id: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """One generation of a job's history; its last figures come when it ends. Times are wall-clock.

    steps_before: the job's steps where it began. steps: of those that it did, those that later ones went on from.
    """

    incarnation: int
    generation: Generation
    cause: Cause
    started_s: float
    pause_s: float = 0.0
    steps: int = 0
    mean_gain: float = 0.0
    effective_lr: float = 0.0
    steps_before: int = 0
    first_tau: float = 0.0
    last_tau: float = 0.0
    # 0 while it is the current one.
    ended_s: float = 0.0
    end_reason: str = ""

    @property
    def key(self) -> tuple[int, int]:
        return (self.incarnation, self.generation.number)


@dataclass(frozen=True, slots=True)
class Marks:
    """Wall-clock moments that displays need after a restart; 0 means that it has not happened."""

    finished_s: float = 0.0
    checkpoint_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Save:
    """What one decision changed. It is saved whole or not at all.

    record None: the record did not change. generations replace earlier ones with the same key.
    points: more of the job's curve, or, with points_anew, all of it. forget: the job and all that belongs to it go.
    """

    job: str
    record: Record | None = None
    marks: Marks = Marks()
    events: tuple[StoredEvent, ...] = ()
    generations: tuple[GenerationSummary, ...] = ()
    points: tuple[Point, ...] = ()
    points_anew: bool = False
    forget: bool = False


@dataclass(frozen=True, slots=True)
class StoredJob:
    record: Record
    marks: Marks
    events: tuple[StoredEvent, ...]
    generations: tuple[GenerationSummary, ...]
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """All that a store holds. last_sequence: the highest sequence number ever given to an event."""

    jobs: tuple[StoredJob, ...] = ()
    last_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Leader:
    """Where the controller that decides is reached; empty while nobody knows."""

    grpc_address: str = ""
    http_url: str = ""


class Store(Protocol):
    """Saves in the order asked; once it failed it saves nothing more, so that no later save skips an earlier one.

    One store is for one term: it waits for the lead, has it, and has lost it for good once `lost` is set.
    """

    lost: asyncio.Event

    @property
    def leader(self) -> Leader:
        """Who leads, as far as this store knows."""

    @property
    def lost_reason(self) -> str:
        """Why the lead was lost; empty until then."""

    async def lead(self, me: Leader) -> None:
        """Return when this controller, `me`, and no other, may decide and save. Raises StoreError if it never will."""

    def leads(self) -> bool:
        """Whether that is still so, by this machine's own clock: asked before anything leaves the controller."""

    async def load(self) -> Stored:
        """What was saved. Called once, after `lead` and before the first save. Raises StoreError."""

    def save(self, save: Save) -> asyncio.Future[None]:
        """Ask for a save, without blocking; the future is done when it is durable, or has a StoreError."""

    async def close(self) -> None:
        """Finish what was asked for, then let go of the lead."""
