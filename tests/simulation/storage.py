"""The checkpoints' folder as every worker sees it: fenced by generation, each checkpoint whole or absent."""

from __future__ import annotations

from dataclasses import dataclass

from simulation.histories import State


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint; state and cursor are its content."""

    generation: int
    step: int
    state: State
    cursor: int


class Fenced(Exception):
    """A newer generation has begun there."""


class Storage:
    """What `stretto.Checkpointer` promises."""

    def __init__(self) -> None:
        self.fence = 0
        self.checkpoints: list[Saved] = []

    def raise_fence(self, generation: int) -> None:
        """Refuse older generations from now on. Raises Fenced where a newer one has done so."""
        self.check(generation)
        self.fence = generation

    def check(self, generation: int) -> None:
        """Raise Fenced for a generation that may not save."""
        if generation < self.fence:
            raise Fenced(f"generation {generation} may not save: generation {self.fence} has begun")

    def commit(self, saved: Saved) -> None:
        """Make a checkpoint appear, whole. Raises Fenced."""
        self.check(saved.generation)
        self.checkpoints.append(saved)

    def newest(self) -> Saved | None:
        """The highest generation, then the highest step."""
        return max(self.checkpoints, key=lambda saved: (saved.generation, saved.step), default=None)
