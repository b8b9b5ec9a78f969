"""What one review of a job's size leaves for the next. Known only while this controller runs."""

from __future__ import annotations

from dataclasses import dataclass

from stretto_controller.core.goodput.measured import Measured
from stretto_controller.core.report import Progress


@dataclass(frozen=True, slots=True)
class Review:
    """Times are the controller's monotonic seconds."""

    # Of the generation that was reviewed last: what belongs to it begins anew with the next.
    generation: int = 0
    # When its size began.
    resized_s: float = 0.0
    progress: Progress | None = None
    # When it came.
    progress_s: float = 0.0
    # Steps of it that were measured.
    steps: int = 0
    # Its pause was measured, or was no change of size.
    pause_known: bool = False
    # The record's, with what is not saved yet; None: the record's.
    measured: Measured | None = None
    saved_s: float | None = None
    # 1, -1: a larger, a smaller size was better at every review since then.
    direction: int = 0
    wish_since_s: float | None = None
    # The size that was recommended in an event.
    told: int | None = None
