"""The micro-batches of one optimizer step: their sizes, their weights, and the sums that the ranks exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stretto.norms import SqrNorm

_SPREAD = 1e-9  # relative; sample counts are whole numbers, so more than rounding means that they differ


class Window:
    """Counts this rank's micro-batches and samples since the last step.

    Without announcements each micro-batch has `batch_size` samples and a step is expected to have
    world_size * accumulation_steps of them (`nominal_total`).
    """

    def __init__(self, *, batch_size: int, accumulation_steps: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.world_size = world_size
        self._announced: tuple[int, int | None] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the micro-batches seen so far; an announcement for the next one stays."""
        self.micro_batches = 0
        self.samples = 0
        self.latest = 0  # samples of the micro-batch that is in its backward, or was last
        self.total: int | None = None  # samples of the whole step, where the user said so
        self.problem = ""

    def announce(self, samples: int, total: int | None) -> None:
        """Say how many samples the next micro-batch has, and the whole step, if known."""
        self._announced = (samples, total)

    @property
    def next_samples(self) -> int:
        """Samples of the micro-batch whose backward comes next."""
        return self._announced[0] if self._announced else self.batch_size

    @property
    def nominal_total(self) -> int:
        return self.world_size * self.accumulation_steps * self.batch_size

    @property
    def denominator(self) -> int:
        """What this rank's gradients are divided by: the step's samples as far as it knows."""
        return self.nominal_total if self.total is None else self.total

    def open_micro_batch(self) -> None:
        """Count a backward that begins; after a full window that was never stepped, a new window begins."""
        if self.micro_batches >= self.accumulation_steps:
            self.clear()
        before = self.denominator
        self.latest = self.next_samples
        total = self._announced[1] if self._announced else None
        self._announced = None
        if total is not None:
            self.total = total
            if self.micro_batches and total != before:
                self.problem = (
                    f"set_num_samples: total is {total}, but earlier micro-batches of this step were weighted "
                    f"for {before}; give the same total before each micro-batch of a step"
                )
        self.samples += self.latest
        self.micro_batches += 1


@dataclass(frozen=True)
class LocalSums:
    """One rank's share of a step's statistics, before the ranks have added them up."""

    samples: int
    contributions: int
    weighted_sqr_norm: SqrNorm  # sum over its contributions of samples * squared norm of the mean gradient
    global_sqr_norm: SqrNorm  # squared norm of the reduced gradient, which was divided by the denominator
    denominator: float  # 0: the ranks divided by the sum of their samples
    declared: bool = False  # the denominator came from the user, so it has to be right
    problem: str = ""

    def encode(self, agreement: Sequence[float]) -> list[SqrNorm]:
        """Return the numbers whose sums over the ranks `StepTotals.decode` reads."""
        squared = self.denominator**2
        flags = [float(self.declared), float(bool(self.problem))]
        counts = [float(self.samples), float(self.contributions), self.denominator, squared, *flags]
        return [*counts, self.weighted_sqr_norm, self.global_sqr_norm, *agreement]


@dataclass(frozen=True)
class StepTotals:
    """A step's statistics over all ranks; every rank holds the same bits."""

    samples: int
    num_contributions: int
    local_sqr_norm: float
    global_sqr_norm: float
    agreed: list[float]
    problem: str

    @classmethod
    def decode(cls, sums: Sequence[float], *, world_size: int, problem: str) -> StepTotals:
        """Read the summed numbers; `problem` is this rank's own, and any rank's makes one for all."""
        samples, contributions, denominators, squares, declared, problems, weighted, reduced = sums[:8]
        denominator = denominators / world_size
        if problems:
            problem = problem or "another rank could not use this step's sample counts; its error says why"
        elif world_size * squares - denominators**2 > _SPREAD * denominators**2:
            problem = (
                "set_num_samples: the ranks gave different totals, or only some of them gave one; "
                "give the samples of the whole step, the same number on every rank"
            )
        elif declared and samples != denominator:
            problem = (
                f"set_num_samples: total is {denominator:.0f}, but the ranks used {samples:.0f} samples in this "
                "step; total is the sum over all ranks and micro-batches of the step"
            )
        elif samples == 0:
            problem = "set_num_samples: every rank has 0 samples in this step; a step needs at least one"
        # Where the divisor was not the true count (a short window), the mean gradient is this much larger.
        stretch = (denominator / samples) ** 2 if denominator and samples else 1.0
        return cls(
            samples=round(samples),
            num_contributions=round(contributions),
            local_sqr_norm=weighted / samples if samples else 0.0,
            global_sqr_norm=reduced / world_size * stretch,
            agreed=list(sums[8:]),
            problem=problem,
        )


def to_vector(values: Sequence[SqrNorm], device: torch.device) -> torch.Tensor:
    """Pack numbers into one float64 vector on `device` without waiting for those that are on it already."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float64, device=device)
    vector = torch.tensor([0.0 if isinstance(v, torch.Tensor) else v for v in values], dtype=torch.float64)
    vector = vector.to(device)
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            vector[index] = value
    return vector
