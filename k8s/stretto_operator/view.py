"""What the controller says of one job. Pure values; `controller` fills them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from stretto_operator.job import Autoscale, Training

# Nothing is known of what the job asks for.
UNSAID, NO_AUTOSCALE = Training(0, 0), Autoscale()
FINISHED = ("succeeded", "failed")


@dataclass(frozen=True, slots=True)
class NodeView:
    """One agent: its state (joining, spare, active, draining, lost), and its rank; -1 outside the generation."""

    state: str
    rank: int = -1


@dataclass(frozen=True, slots=True)
class JobView:
    """One job. remaining_s is negative, other figures are 0, until known."""

    phase: str
    reason: str = ""
    desired_nodes: int = 0
    training: Training = UNSAID
    autoscale: Autoscale = NO_AUTOSCALE
    # 0: none.
    recommended_nodes: int = 0
    # 0 while none has begun.
    generation: int = 0
    scale: float = 0.0
    tau: float = 0.0
    gain: float = 0.0
    progress_rate: float = 0.0
    remaining_s: float = -1.0
    nodes: Mapping[str, NodeView] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def finished(self) -> bool:
        return self.phase in FINISHED

    @property
    def active_nodes(self) -> int:
        return sum(1 for node in self.nodes.values() if node.state in ("active", "draining") and node.rank >= 0)


@dataclass(frozen=True, slots=True)
class ControllerView:
    """reachable: it answered. reason: why it did not. job None: it knows none of this name. refusal: what it said to
    the latest request about this job, if it refused that."""

    reachable: bool
    reason: str = ""
    job: JobView | None = None
    refusal: str = ""
