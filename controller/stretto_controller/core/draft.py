"""A decision in the making: the only mutable thing of the core, and it never outlives one `step`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stretto_controller.core.actions import Action, Decision, Dismiss, LogEvent
from stretto_controller.core.changed import changed
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import (
    Farewell,
    JobState,
    Live,
    Node,
    NodeState,
    Phase,
    Ready,
    Record,
    Session,
    WorkerReady,
)

# Lost nodes stay visible until so many newer ones are lost.
LOST_KEPT = 8
# Agents that were sent home are known until so many others have been.
DISMISSED_KEPT = 64


class Draft:
    """Collects what one event changes. The record keeps its identity unless a durable value really changed."""

    def __init__(self, state: JobState, now_s: float, limits: Limits) -> None:
        self.record: Record = state.record
        self.live: Live = state.live
        self.now_s = now_s
        self.limits = limits
        self.actions: list[Action] = []
        self.reason = ""
        self.quiet = False
        # A Ready that was answered already: answered again, unless this very event ends that generation.
        self.repeated: tuple[str, Ready] | None = None
        # In-process mode: the same, by the session of the worker that asked.
        self.repeated_by: tuple[str, WorkerReady] | None = None

    def update(self, **changes: Any) -> None:
        """Set durable fields."""
        if any(getattr(self.record, name) != value for name, value in changes.items()):
            self.record = replace(self.record, **changes)

    def set_live(self, **changes: Any) -> None:
        self.live = changed(self.live, **changes)

    def act(self, action: Action) -> None:
        self.actions.append(action)

    def dismiss(self, node_id: str, *, success: bool, reason: str) -> None:
        """Send a known node's agent home for good: should it miss the word, it is told again when it comes back."""
        dismissed = {**self.record.dismissed, self.record.nodes[node_id].key_hash: Farewell(node_id, success, reason)}
        self.update(dismissed=dict(list(dismissed.items())[-DISMISSED_KEPT:]))
        self.act(Dismiss(node_id, success, reason))

    def log(self, kind: str, reason: str, *, node_id: str = "") -> None:
        """Tell the job's story; the latest line is also the decision's reason."""
        generation = self.record.generation.number if self.record.generation else 0
        self.actions.append(LogEvent(kind, reason, node_id, generation))
        self.reason = reason

    def enter(self, phase: Phase, reason: str) -> None:
        """Change the phase, and say why when the phase or the reason is new."""
        if self.record.phase is phase and self.record.reason == reason:
            return
        self.update(phase=phase, reason=reason)
        self.log(phase.value, reason)

    def put(self, node: Node) -> None:
        if self.record.nodes.get(node.node_id) != node:
            self.update(nodes={**self.record.nodes, node.node_id: node})

    def change(self, node_id: str, **changes: Any) -> None:
        """Set fields of a known node."""
        self.put(replace(self.record.nodes[node_id], **changes))

    def lose(self, node_id: str) -> None:
        """Keep the node only as a lost one, to be seen on the page."""
        self.change(node_id, state=NodeState.LOST, ready=None)
        lost = [n for n in self.record.nodes.values() if n.state is NodeState.LOST]
        for node in sorted(lost, key=lambda n: n.order)[: max(0, len(lost) - LOST_KEPT)]:
            self.remove(node.node_id)

    def remove(self, node_id: str) -> None:
        self.update(nodes={k: v for k, v in self.record.nodes.items() if k != node_id})
        self.set_live(sessions={k: v for k, v in self.live.sessions.items() if k != node_id})

    def put_session(self, node_id: str, session: Session) -> None:
        self.set_live(sessions={**self.live.sessions, node_id: session})

    def session(self, node_id: str) -> Session | None:
        return self.live.sessions.get(node_id)

    def connected(self, node_id: str) -> bool:
        session = self.session(node_id)
        return session is not None and session.closed_s is None

    def present(self) -> list[Node]:
        """Nodes that are not lost, in the order in which they came."""
        nodes = [n for n in self.record.nodes.values() if n.state is not NodeState.LOST]
        return sorted(nodes, key=lambda n: n.order)

    def members(self) -> list[Node]:
        """Present nodes of the current generation, by rank."""
        generation = self.record.generation
        if generation is None:
            return []
        nodes = (self.record.nodes.get(node_id) for node_id in generation.node_ids)
        return [n for n in nodes if n is not None and n.state in (NodeState.ACTIVE, NodeState.DRAINING)]

    def decision(self) -> Decision:
        return Decision(JobState(self.record, self.live), tuple(self.actions), self.reason, self.quiet)
