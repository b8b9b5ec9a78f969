"""A checkpoint's name says where it stands among the others."""

from __future__ import annotations

import re
from dataclasses import dataclass

STEP_LIMIT = 10**12  # digits in the name
GENERATION_LIMIT = 10**10
SAVE_LIMIT = 1 << 52  # ids travel as numbers in an all-reduce

_NAME = re.compile(r"generation-(\d{10})-step-(\d{12})-([0-9a-f]{13})")
_FENCE = re.compile(r"fence-(\d{10})")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Newest means the highest generation, then the highest step; `save` is drawn anew for each attempt."""

    generation: int
    step: int
    save: int = 0

    def __str__(self) -> str:
        return f"generation-{self.generation:010d}-step-{self.step:012d}-{self.save:013x}"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """Return the position that a folder's name says, or None for the name of something else."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2]), int(match[3], 16)) if match else None


def fence_name(generation: int) -> str:
    return f"fence-{generation:010d}"


def fence_generation(name: str) -> int | None:
    """The generation that a fence's name says, or None for the name of something else."""
    match = _FENCE.fullmatch(name)
    return int(match[1]) if match else None


def check_position(*, generation: int, step: int = 0) -> None:
    """Raise ValueError for a number that no name can say."""
    for name, value, limit in (("generation", generation, GENERATION_LIMIT), ("step", step, STEP_LIMIT)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"{name} is {value!r}; allowed: whole numbers from 0 to {limit - 1}")
