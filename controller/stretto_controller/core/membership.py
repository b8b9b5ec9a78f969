"""Facts about nodes: who came, who is ready, who went. `job.reconsider` draws the consequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stretto_controller.core import events as ev
from stretto_controller.core import liveness, readiness
from stretto_controller.core.actions import (
    Assign,
    CloseSession,
    Dismiss,
    FinishGeneration,
    StartWorkers,
    StopWorkers,
)
from stretto_controller.core.draft import Draft
from stretto_controller.core.errors import Rejected
from stretto_controller.core.model import Farewell, Node, NodeState, Phase, Ready, Record, Session


def hello(draft: Draft, event: ev.NodeHello) -> None:
    """A node opens a stream. Raises Rejected when it may not be a node of this job."""
    _check(draft, event)
    farewell = draft.record.dismissed.get(event.key_hash)
    if farewell is not None:
        draft.act(Dismiss(event.node_id, farewell.success, farewell.reason))
        return
    known = draft.record.nodes.get(event.node_id)
    if known is not None and known.key_hash != event.key_hash:
        known = _replace_claimed(draft, known)
    draft.update(spec=draft.record.spec.merged(event.spec))
    old = draft.session(event.node_id)
    if old is not None and old.closed_s is None and old.session_id != event.session_id:
        draft.act(CloseSession(old.session_id))
    if known is None or known.state is NodeState.LOST:
        _join(draft, event)
    draft.put_session(event.node_id, Session(event.session_id, heard_s=draft.now_s))
    end_grace_when_all_are_back(draft)
    if event.ready is not None:
        take_ready(draft, event.node_id, event.ready)
    elif draft.record.nodes[event.node_id].ending:
        reason = f"workers of {event.node_id} were lost"
        draft.act(StopWorkers(event.node_id, draft.record.next_generation - 1, reason, force=True))
    elif event.generation:
        _stop_if_stale(draft, event.node_id, event.generation)


def _check(draft: Draft, event: ev.NodeHello) -> None:
    limits = draft.limits
    if not 1 <= event.slots <= limits.max_slots:
        raise Rejected.invalid(f"slots is {event.slots}; a node has 1 to {limits.max_slots} worker processes")
    if event.node_id not in draft.record.nodes and len(draft.record.nodes) >= limits.max_nodes:
        raise Rejected.exhausted(f"job {draft.record.name} has {limits.max_nodes} nodes, the limit of this controller")


def _replace_claimed(draft: Draft, known: Node) -> Node | None:
    """Another agent shows a node's name: only where that node is surely gone may it take the name over."""
    recovering = draft.live.grace_until_s is not None and draft.now_s < draft.live.grace_until_s
    if known.state is not NodeState.LOST and (draft.connected(known.node_id) or recovering):
        raise Rejected.denied(
            f"node id {known.node_id} belongs to another agent of job {draft.record.name}; choose another id"
        )
    if known.state is not NodeState.LOST:
        go(draft, known, f"{known.node_id} is gone: a new agent has its name", kind="node_lost")
    return draft.record.nodes.get(known.node_id)


def _join(draft: Draft, event: ev.NodeHello) -> None:
    order = draft.record.next_order
    draft.update(next_order=order + 1, next_generation=max(draft.record.next_generation, event.generation + 1))
    draft.put(Node(event.node_id, event.key_hash, event.slots, event.address, order))
    draft.log(
        "node_joined", f"{event.node_id} joined with {event.slots} slot{'s' * (event.slots > 1)}", node_id=event.node_id
    )


def _stop_if_stale(draft: Draft, node_id: str, number: int) -> None:
    """Workers of a generation that is over are to be stopped; so are those of one that is being changed."""
    generation = draft.record.generation
    current = generation is not None and generation.number == number and generation.has(node_id)
    if current and draft.record.nodes[node_id].state is not NodeState.JOINING:
        if draft.record.phase is Phase.RECONFIGURING:
            draft.act(StopWorkers(node_id, number, draft.record.reason))
        return
    draft.act(StopWorkers(node_id, number, f"generation {number} is over"))


def end_grace_when_all_are_back(draft: Draft) -> None:
    """Every stream that should be open is open again: from now on silence means something."""
    if draft.live.grace_until_s is None or not all(liveness.is_heard(draft, n.node_id) for n in draft.present()):
        return
    members = [n for n in draft.members() if not n.succeeded] if draft.record.in_process else []
    if all(len(readiness.workers_of(draft, n.node_id)) == n.slots for n in members):
        draft.set_live(grace_until_s=None)


def farewells(record: Record) -> Mapping[str, Farewell]:
    """By key: every agent of a finished job, and what it is told when it comes back."""
    success = record.phase is Phase.SUCCEEDED
    own = {node.key_hash: Farewell(node.node_id, success, record.reason) for node in record.nodes.values()}
    return {**record.dismissed, **own}


def returning(draft: Draft, event: ev.NodeHello) -> None:
    """Answer an agent of a finished job that was away."""
    draft.put_session(event.node_id, Session(event.session_id, heard_s=draft.now_s))
    known, generation = draft.record.nodes.get(event.node_id), draft.record.generation
    if known is not None and known.key_hash == event.key_hash and known.succeeded and generation is not None:
        draft.act(FinishGeneration(event.node_id, generation.number))
    farewell = farewells(draft.record)[event.key_hash]
    draft.act(Dismiss(event.node_id, farewell.success, farewell.reason))


def heartbeat(draft: Draft, event: ev.NodeHeartbeat) -> None:
    session = draft.session(event.node_id)
    if session is not None and session.session_id == event.session_id:
        draft.put_session(event.node_id, replace(session, heard_s=draft.now_s))
        end_grace_when_all_are_back(draft)


def _speaks_for(draft: Draft, node_id: str, session_id: str) -> bool:
    """The message comes on the node's present stream, which is a sign of life, and the node is known."""
    session = draft.session(node_id)
    node = draft.record.nodes.get(node_id)
    if session is None or session.session_id != session_id:
        return False
    draft.put_session(node_id, replace(session, heard_s=draft.now_s))
    return node is not None and node.state is not NodeState.LOST


def ready(draft: Draft, event: ev.NodeReady) -> None:
    if _speaks_for(draft, event.node_id, event.session_id):
        take_ready(draft, event.node_id, event.ready)


def take_ready(draft: Draft, node_id: str, ready: Ready) -> None:
    """A node without workers asks for an assignment, perhaps not for the first time."""
    node = draft.record.nodes[node_id]
    if draft.record.in_process:
        _start_workers(draft, node, ready)
        return
    generation = draft.record.generation
    if node.ready == ready:
        return
    member = generation is not None and generation.has(node_id) and node.state is not NodeState.JOINING
    if member and generation is not None and ready.request_id == node.answered_request:
        if draft.record.phase is Phase.RUNNING:
            draft.repeated = (node_id, ready)
            return
    elif member and generation is not None and ready.failed and draft.live.failure_s is None:
        draft.set_live(failure_s=draft.now_s)
        how = f" (signal {ready.exit_signal})" if ready.exit_signal else ""
        draft.log("workers_failed", f"workers of {node_id} failed{how}", node_id=node_id)
    if node.state is NodeState.DRAINING and not node.drain_requested:
        # Its workers had SIGTERM because a sibling failed, not because the agent ends: it is still there.
        draft.change(node_id, state=NodeState.ACTIVE)
    # Who asks again has not ended well after all.
    draft.change(node_id, ready=ready, succeeded=False)


def _start_workers(draft: Draft, node: Node, ready: Ready) -> None:
    """In-process mode: no worker runs on the node, so it is out of its generation; let it start new ones."""
    draft.change(node.node_id, ending=False)
    if ready.request_id == node.answered_request:
        draft.act(StartWorkers(node.node_id, ready.request_id, ready.failed))
        return
    part_from_workers(draft, node)
    if node.node_id not in draft.record.nodes:
        return
    if ready.failed:
        how = f" (signal {ready.exit_signal})" if ready.exit_signal else ""
        draft.log("workers_failed", f"workers of {node.node_id} failed{how}", node_id=node.node_id)
    if ready.failed and ready.restarts_left == 0:
        reason = "its workers failed and no restarts are left"
        draft.dismiss(node.node_id, success=False, reason=reason)
        go(draft, node, f"{node.node_id}: {reason}", kind="node_failed")
        draft.set_live(gave_up=not draft.present())
        return
    draft.change(node.node_id, answered_request=ready.request_id)
    draft.act(StartWorkers(node.node_id, ready.request_id, ready.failed))


def part_from_workers(draft: Draft, node: Node) -> None:
    """In-process mode: the node is out of its generation, and may take part again with new workers.

    One that was to drain has nothing left to drain: it goes.
    """
    if node.state is NodeState.DRAINING and node.drain_requested:
        draft.dismiss(node.node_id, success=True, reason="drained")
        go(draft, node, f"{node.node_id} drained", kind="node_drained")
        return
    for worker in readiness.workers_of(draft, node.node_id):
        draft.act(CloseSession(worker.session_id))
    readiness.forget_workers(draft, node.node_id)
    part(draft, node)


def part(draft: Draft, node: Node) -> None:
    """In-process mode: the node is out of its generation."""
    generation = draft.record.generation
    if generation is not None and generation.has(node.node_id) and node.state is NodeState.ACTIVE:
        _note_gone(draft, node.node_id)
    draft.change(node.node_id, state=NodeState.JOINING, succeeded=False)


def answer_again(draft: Draft) -> bool:
    """Send a repeated Ready its assignment again. False if that generation is over: it is then a new request."""
    assert draft.repeated is not None, "only a repeated request is answered again"
    (node_id, ready), draft.repeated = draft.repeated, None
    generation = draft.record.generation
    node = draft.record.nodes.get(node_id)
    if node is None or node.state is NodeState.LOST:
        return True
    if draft.record.phase is Phase.RUNNING and generation is not None and generation.has(node_id):
        draft.act(Assign(node_id, ready.request_id, generation))
        return True
    draft.change(node_id, ready=ready)
    return False


def succeeded(draft: Draft, event: ev.NodeSucceeded) -> None:
    generation = draft.record.generation
    if not _speaks_for(draft, event.node_id, event.session_id):
        return
    if draft.record.in_process:
        _succeeded_in_process(draft, draft.record.nodes[event.node_id])
    elif generation is not None and generation.number == event.generation and generation.has(event.node_id):
        draft.change(event.node_id, succeeded=True)
        draft.log("node_succeeded", f"workers of {event.node_id} ended well", node_id=event.node_id)


def _succeeded_in_process(draft: Draft, node: Node) -> None:
    """Live workers end well when the target is reached, or because their node goes while the others train on."""
    if node.state is NodeState.ACTIVE or (node.state is NodeState.DRAINING and draft.record.target_reached):
        draft.update(target_reached=True)
        draft.set_live(target_s=draft.now_s if draft.live.target_s is None else draft.live.target_s)
        draft.change(node.node_id, succeeded=True)
        draft.log("node_succeeded", f"workers of {node.node_id} ended well", node_id=node.node_id)
    else:
        draft.dismiss(node.node_id, success=True, reason="its workers have ended")
        go(draft, node, f"{node.node_id} drained: its workers have ended well", kind="node_drained")


def left(draft: Draft, event: ev.NodeLeft) -> None:
    if not _speaks_for(draft, event.node_id, event.session_id):
        return
    node = draft.record.nodes[event.node_id]
    if event.succeeded or node.succeeded:
        draft.change(event.node_id, succeeded=True)
    elif event.failed:
        detail = f": {event.message}" if event.message else ""
        go(draft, node, f"{event.node_id} gave up{detail}", kind="node_failed")
        draft.set_live(gave_up=not draft.present())
    else:
        go(draft, node, f"{event.node_id} drained", kind="node_drained")


def closed(draft: Draft, event: ev.StreamClosed) -> None:
    session = draft.session(event.node_id)
    if session is None or session.session_id != event.session_id:
        return
    draft.put_session(event.node_id, replace(session, closed_s=draft.now_s))
    node = draft.record.nodes.get(event.node_id)
    if node is None or node.state is NodeState.LOST:
        return
    # Live workers say themselves when they have left; until then their agent may only have lost its stream.
    if node.state is NodeState.DRAINING and not (draft.record.in_process and readiness.is_running(draft, node)):
        go(draft, node, f"{event.node_id} drained", kind="node_drained")
    else:
        liveness.note_closure(draft)


def go(draft: Draft, node: Node, reason: str, *, kind: str) -> None:
    """The node is no longer there. If it was a member, the change under way remembers it."""
    generation, change = draft.record.generation, draft.record.change
    draft.log(kind, reason, node_id=node.node_id)
    for worker in readiness.workers_of(draft, node.node_id):
        # Should they still be there, they hear of it when they come back.
        draft.act(CloseSession(worker.session_id))
    readiness.forget_workers(draft, node.node_id)
    session = draft.session(node.node_id)
    if kind == "node_lost":
        draft.lose(node.node_id)
        if session is not None and session.closed_s is None:
            draft.act(CloseSession(session.session_id))
    else:
        draft.remove(node.node_id)
    if change is None or generation is None or not generation.has(node.node_id):
        return
    if kind == "node_drained":
        draft.update(change=replace(change, drained=(*change.drained, node.node_id)))
    else:
        _note_gone(draft, node.node_id)


def _note_gone(draft: Draft, node_id: str) -> None:
    """The change under way remembers who went: nobody else is then at fault."""
    change = draft.record.change
    if change is not None and node_id not in change.gone:
        draft.update(change=replace(change, gone=(*change.gone, node_id)))


def drain(draft: Draft, node_id: str, *, requested: bool) -> None:
    """The node is to leave at the next step boundary; one without workers leaves at once.

    requested: a person asked for it; otherwise a worker had SIGTERM, which usually means that its agent had it too.
    """
    node = draft.record.nodes.get(node_id)
    if node is None or node.state is NodeState.LOST:
        raise Rejected.not_found(f"job {draft.record.name} has no node {node_id}")
    if node.state is NodeState.DRAINING and node.drain_requested >= requested:
        return
    draft.change(node_id, state=NodeState.DRAINING, drain_requested=requested)
    draft.log("node_draining", f"{node_id} drains", node_id=node_id)
