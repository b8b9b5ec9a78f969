"""A record of which samples each committed step used: the evidence for "exactly once per epoch"."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class SampleLog:
    """Appends JSON lines to a file that outlives generations. Rank 0 writes.

    A generation first writes the latest steps once more (those after `repeats_after`), in case that an earlier rank 0
    died before it could. A live one gives up nothing. One that began with a checkpoint, of step `resumed_step`, gives
    up what earlier ones did after it.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, generation: int, repeats_after: int, resumed_step: int | None
    ) -> None:
        """resumed_step: None for a live generation."""
        self._generation = generation
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        resumed = {} if resumed_step is None else {"resumed_step": resumed_step}
        self._append({**resumed, "repeats_after": repeats_after})

    def committed(self, step: int, epoch: int, indices: Sequence[int]) -> None:
        """One step."""
        self._append({"step": step, "epoch": epoch, "indices": list(indices)})

    def close(self) -> None:
        os.close(self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        # One write: a process that is killed leaves whole lines.
        os.write(self._file, json.dumps({"generation": self._generation, **entry}).encode() + b"\n")


# A live generation repeats a few steps only.
_REPEATED = 8


@dataclass(frozen=True)
class LoggedStep:
    """One line of the log."""

    generation: int
    step: int
    epoch: int
    indices: tuple[int, ...]


def effective_steps(lines: Iterable[str]) -> list[LoggedStep]:
    """The steps that count, in order: without those that a later generation took back.

    ValueError where a live generation did a step again that counted already.
    """
    steps: list[LoggedStep] = []
    for line in lines:
        entry = json.loads(line)
        if "resumed_step" in entry:
            steps = [step for step in steps if step.step <= entry["repeats_after"]]
        elif "step" in entry:
            step = LoggedStep(entry["generation"], entry["step"], entry["epoch"], tuple(entry["indices"]))
            same = [done for done in steps[-_REPEATED:] if done.step == step.step]
            if not same:
                steps.append(step)
            elif (same[0].epoch, same[0].indices) != (step.epoch, step.indices):
                raise ValueError(
                    f"step {step.step} was done in generation {same[0].generation}, and again in {step.generation}"
                )
    return steps


def used_exactly_once(lines: Iterable[str]) -> bool:
    """Whether steps have no gaps and no epoch used a sample twice, or left one out before the next epoch began."""
    try:
        steps = effective_steps(lines)
    except ValueError:
        return False
    if [step.step for step in steps] != list(range(1, len(steps) + 1)):
        return False
    epochs: dict[int, list[int]] = {}
    for step in steps:
        epochs.setdefault(step.epoch, []).extend(step.indices)
    finished = [sorted(used) for epoch, used in sorted(epochs.items())][:-1]
    unique = all(len(set(used)) == len(used) for used in epochs.values())
    return unique and list(epochs) == list(range(len(epochs))) and all(used == finished[0] for used in finished)
