"""Facts of which nothing follows yet: hundreds come at once, and each would look at every node of its job in vain.

A shortcut, never a rule of its own: where it says that nothing follows, `reconsider` would change nothing but what time
alone brings, and for that there is `next_wake_s`.
"""

from __future__ import annotations

from stretto_controller.core import events as ev
from stretto_controller.core import readiness
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import JobState, Node, NodeState, Phase, Version


def changes_nothing_yet(draft: Draft, before: JobState, event: ev.Event) -> bool:
    """Whether the event, whose fact is in the draft, leaves the job as it is. before: without the fact."""
    if not isinstance(event, ev.NodeHello | ev.WorkerHello | ev.WorkerAsked):
        return False
    live, old = draft.live, before.live
    if draft.record is not before.record or live.failure_s != old.failure_s or live.grace_until_s != old.grace_until_s:
        return False
    if draft.record.target_reached or draft.repeated is not None or draft.repeated_by is not None:
        return False
    node = _node(draft, event)
    if node is None:
        return False
    if draft.record.phase is Phase.RUNNING and event.ready is None:
        return _is_back(draft, node, event)
    if not draft.record.in_process or isinstance(event, ev.NodeHello) or event.ready is None:
        return False
    match draft.record.phase:
        case Phase.RUNNING:
            change = draft.record.change
            leaves = change is not None and change.leaving and not event.ready.failed
            return leaves and _in_time(draft) and _another_is_awaited(draft)
        case Phase.RECONFIGURING:
            nobody_drains = all(n.state is not NodeState.DRAINING for n in draft.record.nodes.values())
            return nobody_drains and _in_time(draft) and _another_is_awaited(draft)
        case Phase.PENDING | Phase.FORMING:
            # Who holds a state is waited for in full.
            return event.ready.version == Version() and not readiness.is_ready(draft, node)
    return False


def _node(draft: Draft, event: ev.NodeHello | ev.WorkerHello | ev.WorkerAsked) -> Node | None:
    if isinstance(event, ev.WorkerAsked):
        worker = draft.live.workers.get(event.session_id)
        return draft.record.nodes.get(worker.node_id) if worker is not None else None
    return draft.record.nodes.get(event.node_id)


def _is_back(draft: Draft, node: Node, event: ev.NodeHello | ev.WorkerHello | ev.WorkerAsked) -> bool:
    """A member that speaks to us again, and trains: that keeps it from being lost, and nothing else.

    Not while a change is under way, whose end may have waited for it.
    """
    generation = draft.record.generation
    trains = generation is not None and generation.has(node.node_id) and node.state is NodeState.ACTIVE
    if isinstance(event, ev.WorkerHello):
        trains = trains and generation is not None and event.generation == generation.number
    return trains and not node.succeeded and not node.ending and node.ready is None and draft.record.change is None


def _in_time(draft: Draft) -> bool:
    limit_s = draft.live.change_limit_s
    return limit_s is None or draft.now_s < limit_s


def _another_is_awaited(draft: Draft) -> bool:
    """A member that has to leave the generation has not: it ends with the last of them."""
    generation = draft.record.generation
    if generation is None:
        return False
    # From the end: requests come by rank more often than not.
    for member in reversed(generation.members):
        node = draft.record.nodes.get(member.node_id)
        if node is None or node.succeeded or node.state is not NodeState.ACTIVE:
            continue
        if not readiness.is_ready(draft, node):
            return True
    return False
