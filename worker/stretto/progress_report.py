"""The figures of committed steps, as the controller is told of them: the latest replace all earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

from stretto.histogram import Histogram


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One committed step, as a session's `report` takes it."""

    step: int
    tau: float
    tau_before: float
    gain: float
    scale: float
    loss: float
    effective_lr: tuple[float, ...]
    base_lr: tuple[float, ...]
    variance: float
    sqr_norm: float
    samples: int
    epoch: int
    step_s: float
    # Adasum's, over the layers: minimum, median, maximum; empty under any other rule.
    orthogonality: tuple[float, ...] = ()


class ProgressReport:
    """Counts a generation's committed steps. The histogram of step times goes on over generations."""

    def __init__(self, generation: int) -> None:
        self._step_seconds = Histogram()
        self.begin(generation)

    def begin(self, generation: int) -> None:
        """From now on steps are of this generation."""
        self.generation = generation
        self.latest: StepFigures | None = None
        # The latest figures were not sent yet.
        self.unsent = False
        self._steps = 0
        self._gain_sum = self._first_tau = 0.0
        self._pause_s = 0.0

    def commit(self, figures: StepFigures, *, pause_s: float) -> None:
        """Count a committed step. pause_s: kept from the generation's first one."""
        if self._steps == 0:
            self._pause_s, self._first_tau = pause_s, figures.tau_before
        self._steps += 1
        self._gain_sum += figures.gain
        self._step_seconds.observe(figures.step_s)
        self.latest = figures
        self.unsent = True

    def message(self) -> pb.TrainRequest:
        """The figures of the latest step; they then count as sent."""
        figures, histogram = self.latest, self._step_seconds
        assert figures is not None, "there is no progress before the first step"
        self.unsent = False
        message = types_pb2.Progress(
            generation=self.generation,
            step=figures.step,
            tau=figures.tau,
            gain=figures.gain,
            scale=figures.scale,
            loss=figures.loss,
            effective_lr=figures.effective_lr,
            base_lr=figures.base_lr,
            variance=figures.variance,
            sqr_norm=figures.sqr_norm,
            samples=figures.samples,
            epoch=figures.epoch,
            orthogonality=figures.orthogonality,
            generation_steps=self._steps,
            generation_gain_sum=self._gain_sum,
            generation_first_tau=self._first_tau,
            pause_s=self._pause_s,
            step_seconds=types_pb2.Histogram(
                upper_bounds=histogram.upper_bounds,
                cumulative_counts=histogram.cumulative_counts,
                count=histogram.count,
                sum=histogram.sum,
            ),
        )
        return pb.TrainRequest(progress=message)
