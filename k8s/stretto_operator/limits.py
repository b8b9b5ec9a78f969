"""How long the operator waits for what. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds, all of them."""

    # A suspended job has so long to save a checkpoint; then its pods get SIGTERM all the same.
    suspend_limit_s: float = 120.0
    # After the end of a job its pods may still be writing, or saying goodbye.
    finish_limit_s: float = 60.0
    # A pod that ended well while training goes on is replaced after this; until then the job may be about to end.
    completed_limit_s: float = 30.0
    # A pod that is still there so long after its grace period is on a lost node: it is deleted by force.
    terminating_limit_s: float = 10.0
    # A pod that failed by its own fault is replaced after this, twice as long each time, up to the limit.
    backoff_s: float = 10.0
    backoff_limit_s: float = 300.0
    # One that the cluster took away is replaced after this.
    disrupted_s: float = 1.0
    # What the controller has refused is asked again after this: somebody may have mended it.
    refused_s: float = 30.0
    # A failure after so long a run is the first one again.
    healthy_run_s: float = 600.0

    def validate(self) -> None:
        """Raises ValueError for a limit that is none."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{each.name} is {value}; it must be a finite number of seconds, at least 0")
