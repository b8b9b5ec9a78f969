"""What workers report of their training: frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Checkpoint:
    generation: int
    step: int
    tau: float
    path: str
    size_bytes: int = 0
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative buckets, as Prometheus defines them."""

    upper_bounds: tuple[float, ...] = ()
    cumulative_counts: tuple[int, ...] = ()
    count: int = 0
    sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """The figures of the latest committed step."""

    generation: int
    step: int
    tau: float = 0.0
    gain: float = 1.0
    scale: float = 0.0
    loss: float = 0.0
    effective_lr: tuple[float, ...] = ()
    base_lr: tuple[float, ...] = ()
    variance: float = 0.0
    sqr_norm: float = 0.0
    samples: int = 0
    epoch: int = 0
    generation_steps: int = 0
    generation_gain_sum: float = 0.0
    generation_first_tau: float = 0.0
    pause_s: float = 0.0
    step_seconds: Histogram = field(default_factory=Histogram)
    # Adasum's, over the layers: minimum, median, maximum; empty under any other rule.
    orthogonality: tuple[float, ...] = ()

    @property
    def generation_first_step(self) -> int:
        """How many steps the generation began with."""
        return max(0, self.step - self.generation_steps)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a live worker gets on with the step under way, as it said in a heartbeat (in-process mode)."""

    generation: int = 0
    # One more than the last that the worker finished.
    step: int = 0
    # At its own part of the step; 0 while it is not.
    working_s: float = 0.0
    # For the other workers; 0 while it does not wait.
    waiting_s: float = 0.0
    # Of its recent steps' durations; 0 until known.
    median_step_s: float = 0.0


NO_PACE = Pace()
