"""Where training stands, beside the model, the optimizer and the sampler: saved, and handed on, with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stretto.feed import StepPlan
from stretto.sampler import ElasticSampler

# A rank can be so many steps ahead of what the others know to be done by all.
_KEPT = 2


@dataclass(frozen=True, slots=True)
class StepSamples:
    """Which samples one step used: `count` of the epoch's order, from `start` on."""

    step: int
    epoch: int
    start: int
    count: int


class Position:
    """Counts steps and samples, and remembers the latest steps' samples for the log."""

    def __init__(self, *, seed: int, base_batch_size: int) -> None:
        self.step = self.samples = 0
        self.seed = seed
        self._base_batch_size = base_batch_size
        self.recent: list[StepSamples] = []

    def advance(self, plan: StepPlan, sampler: ElasticSampler) -> None:
        """One more step was done, with the samples at the sampler's cursor."""
        self.step += 1
        self.samples += len(plan.indices)
        done = StepSamples(self.step, sampler.epoch, sampler.consumed, len(plan.indices))
        self.recent = [*self.recent, done][-_KEPT:]
        sampler.advance(len(plan.indices))

    def recent_between(self, after: int, upto: int) -> Iterator[StepSamples]:
        """The remembered steps in this range, in order."""
        return (done for done in self.recent if after < done.step <= upto)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.samples,
            "seed": self.seed,
            "base_batch_size": self._base_batch_size,
            "recent": [[done.step, done.epoch, done.start, done.count] for done in self.recent],
        }

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Go on from there; ValueError where it belongs to another base batch size."""
        if d["base_batch_size"] != self._base_batch_size:
            raise ValueError(
                f"base_batch_size is {self._base_batch_size}, but the checkpoint was written with "
                f"{d['base_batch_size']}, which its averages and tau refer to: use that, or another directory"
            )
        self.step, self.samples, self.seed = d["step"], d["samples"], d["seed"]
        self.recent = [StepSamples(*numbers) for numbers in d["recent"]]
