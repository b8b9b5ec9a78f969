"""What pages, tools and metrics may see of a job: only what is saved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from stretto_controller.core import pace
from stretto_controller.core.goodput.prediction import Recommendation
from stretto_controller.core.model import JobState, Node, Record
from stretto_controller.core.report import Progress
from stretto_controller.curve import Curve
from stretto_controller.figures import Figures
from stretto_controller.store.contents import GenerationSummary, Marks, StoredEvent


@dataclass(frozen=True, slots=True)
class NodeView:
    node: Node
    # -1 outside the current generation.
    node_rank: int
    connected: bool
    # NaN for a node that this controller has not heard of since it started.
    silent_s: float
    # Its first worker's; -1 outside the current generation.
    first_rank: int = -1
    # The slowest of its workers' usual steps, as they say (in-process mode); NaN until known.
    step_s: float = math.nan


@dataclass(frozen=True, slots=True)
class JobView:
    """One job at one moment. Rates and remaining times are NaN or 0 until they are known, as the fields say."""

    state: JobState
    marks: Marks
    figures: Figures
    now_s: float
    events: tuple[StoredEvent, ...] = ()
    generations: tuple[GenerationSummary, ...] = ()
    curve: Curve = field(default_factory=lambda: Curve(1, 0.0))

    @property
    def record(self) -> Record:
        return self.state.record

    @property
    def progress(self) -> Progress | None:
        return self.state.live.progress

    @property
    def progress_rate(self) -> float:
        """d(tau)/dt in iterations per second; 0.0 until known."""
        return self.figures.rate.value(self.now_s)

    @property
    def recommendation(self) -> Recommendation | None:
        """Which size is best; None until it was looked at."""
        return self.state.live.recommendation

    @property
    def remaining_s(self) -> float:
        """NaN until known."""
        tau = self.progress.tau if self.progress else 0.0
        return self.figures.remaining_s(tau, self.record.spec.target_tau, self.now_s)

    @property
    def straggler_ratio(self) -> float | None:
        """The slowest worker's time at its own part of a step over the median step; None until known."""
        return pace.straggler_ratio(self.state, self.now_s)

    @property
    def nodes(self) -> tuple[NodeView, ...]:
        """In the order in which they came."""
        generation = self.record.generation
        members = {member.node_id: member for member in generation.members} if generation else {}
        steps_s: dict[str, float] = {}
        for worker in self.state.live.workers.values():
            if worker.pace.median_step_s > 0:
                steps_s[worker.node_id] = max(steps_s.get(worker.node_id, 0.0), worker.pace.median_step_s)
        sessions = self.state.live.sessions
        views = []
        for node in sorted(self.record.nodes.values(), key=lambda node: node.order):
            session, member = sessions.get(node.node_id), members.get(node.node_id)
            views.append(
                NodeView(
                    node,
                    member.node_rank if member else -1,
                    connected=session is not None and session.closed_s is None,
                    silent_s=max(0.0, self.now_s - session.heard_s) if session else math.nan,
                    first_rank=member.first_rank if member else -1,
                    step_s=steps_s.get(node.node_id, math.nan),
                )
            )
        return tuple(views)

    @property
    def history(self) -> tuple[GenerationSummary, ...]:
        """All generations that are kept; the current one with the figures that it has reached so far."""
        current, generation = self.generations[-1] if self.generations else None, self.record.generation
        if current is None or generation is None or current.ended_s:
            return self.generations
        # The record learned its scale from the workers, after the generation had begun.
        current = replace(current, generation=generation)
        if self.progress is not None and self.progress.generation == generation.number:
            current = _so_far(current, self.progress)
        return (*self.generations[:-1], current)


def _so_far(summary: GenerationSummary, progress: Progress) -> GenerationSummary:
    steps = progress.generation_steps
    return replace(
        summary,
        steps=steps,
        mean_gain=progress.generation_gain_sum / steps if steps else 0.0,
        effective_lr=progress.effective_lr[0] if progress.effective_lr else 0.0,
        last_tau=progress.tau,
        pause_s=progress.pause_s or summary.pause_s,
    )
