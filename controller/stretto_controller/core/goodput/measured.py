"""What was measured of a job's sizes: from the workers' figures to points that a model is fitted to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stretto_controller.core.goodput.step_time import Point, Shape
from stretto_controller.core.report import Progress

# So many steps of a shape count, at most: what is older fades, as machines and data change.
_REMEMBERED_STEPS = 1000
# Shapes that are kept; the one that was not seen for longest goes first.
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """The durable part: step times by shape, the latest seen last, and what planned changes of size cost."""

    points: tuple[Point, ...] = ()
    # 0.0 until one was measured.
    pause_s: float = 0.0

    def with_steps(self, shape: Shape, nodes: int, step_s: float, steps: int) -> Measured:
        known = next((point for point in self.points if point.shape == shape and point.nodes == nodes), None)
        point = known or Point(shape, nodes, step_s, 0)
        point = point.after(step_s, steps, _REMEMBERED_STEPS)
        others = tuple(other for other in self.points if other is not known)
        return replace(self, points=(*others, point)[-_KEPT:])

    def with_pause(self, pause_s: float) -> Measured:
        """The latest weighs as much as all before it."""
        return replace(self, pause_s=(self.pause_s + pause_s) / 2 if self.pause_s else pause_s)


def window(before: Progress, before_s: float, after: Progress, after_s: float) -> tuple[float, int] | None:
    """(mean duration, number) of the steps between two reports of one generation; None if nothing can be told.

    By when the reports came: what a script does between its steps takes time, too.
    """
    steps = after.step - before.step
    if before.generation != after.generation or steps <= 0 or after_s <= before_s:
        return None
    return (after_s - before_s) / steps, steps
