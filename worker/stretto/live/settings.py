"""A live worker's limits, and how it ends when its job gives up."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from stretto.errors import Fatal
from stretto.group import GroupSettings
from stretto.stream import StreamSettings


@dataclass(frozen=True, slots=True)
class LiveSettings:
    # Progress is sent at most this often by rank 0; the others only show that they advance.
    report_interval_s: float = 0.2
    other_ranks_report_interval_s: float = 1.0
    # When nothing has moved for longer, this worker asks its peers, at each heartbeat, whether they are there. One that
    # answers is waited for: it may be evaluating, or writing a checkpoint.
    stalled_s: float = 3.0
    # After a SIGTERM, a step boundary must come within this; then the worker exits all the same.
    # Above it, torch's agent would send SIGKILL (30 s).
    drain_limit_s: float = 20.0
    # A worker that has left for good waits this long for the controller to say that it heard it.
    farewell_limit_s: float = 2.0
    # Before the process exits, what was said last has this long to reach the controller.
    flush_limit_s: float = 1.0
    # A collective waits for a worker that lives for as long as the controller does (its hang_limit_s), and a bit.
    group: GroupSettings = field(default_factory=lambda: GroupSettings(operation_timeout_s=900.0, roll_call_s=0.5))
    # A worker that is away for longer than the controller's return_s (2.5 s) is taken for lost after its restart.
    stream: StreamSettings = field(default_factory=lambda: StreamSettings(max_backoff_s=1.0))

    def validate(self) -> None:
        """Raise ValueError unless every limit is positive."""
        self.stream.validate()
        for name in (f.name for f in fields(self) if f.name not in ("stream", "group")):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


class GivenUp(Fatal):
    """The job gives up: fewer than min_nodes nodes were left for too long. Save the state, if it is whole."""
