"""Which nodes wait for an assignment: where the two reconfiguration modes differ, they differ here.

In restart mode the agent asks, when no worker runs. In in-process mode the live workers ask, and a node is ready
when all its slots have.
"""

from __future__ import annotations

from dataclasses import replace

from stretto_controller.core import partition
from stretto_controller.core.actions import AskToLeave, AskToSave, AssignWorker, CutGeneration, StopWorkers
from stretto_controller.core.changed import changed
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import Generation, Node, NodeState, Phase, Version, WorkerSession
from stretto_controller.core.report import NO_PACE


def workers_of(draft: Draft, node_id: str) -> tuple[WorkerSession, ...]:
    """The node's workers whose streams are open, by local rank."""
    return draft.live.workers.crew(node_id).open


def is_ready(draft: Draft, node: Node) -> bool:
    """No worker of the node runs in a generation, and the node can be assigned."""
    if not draft.record.in_process:
        return node.ready is not None
    asking = draft.live.workers.crew(node.node_id).asking_ranks
    return len(asking) == node.slots and asking == tuple(range(node.slots))


def version(draft: Draft, node: Node) -> Version:
    """The newest state that the idle live workers of the node hold."""
    asking = draft.live.workers.crew(node.node_id).asking
    return max((w.ready.version for w in asking if w.ready is not None), default=Version())


def speaks(draft: Draft, node: Node) -> bool:
    """The live workers of a node that waits are heard of: no generation should begin with one that hangs."""
    silence_s = draft.limits.missed_heartbeats * draft.limits.heartbeat_interval_s
    return draft.now_s - draft.live.workers.crew(node.node_id).heard_s < silence_s


def is_running(draft: Draft, node: Node) -> bool:
    """Workers of the node run in a generation, or have not yet answered that it is over."""
    generation = draft.record.generation
    if not draft.record.in_process:
        return generation is not None and generation.has(node.node_id) and node.ready is None
    if draft.record.phase is Phase.RUNNING and generation is not None and generation.has(node.node_id):
        return node.state is not NodeState.JOINING
    unanswered = [w for w in workers_of(draft, node.node_id) if w.generation and w.ready is None]
    return bool(unanswered) and speaks(draft, node)


def is_broken(draft: Draft, node: Node) -> bool:
    """A member that no longer trains, though nobody agreed on it."""
    if not draft.record.in_process:
        return node.ready is not None
    change = draft.record.change
    leaving = change is not None and change.leaving
    asking = draft.live.workers.crew(node.node_id).asking
    return any(w.ready is not None and (w.ready.failed or not leaving) for w in asking)


def all_left(draft: Draft) -> bool:
    """Every worker has left the generation after the agreed step."""
    if draft.record.in_process:
        members = [node for node in draft.members() if not node.succeeded]
        return bool(members) and all(is_ready(draft, node) for node in members)
    generation = draft.record.generation
    workers = [w for w in draft.live.workers.values() if generation and w.generation == generation.number]
    return bool(workers) and all(w.left for w in workers)


def ask_to_leave(draft: Draft, reason: str, *, save: bool) -> bool:
    """Ask the workers to leave after an agreed step. False if nobody can be asked."""
    generation = draft.record.generation
    assert generation is not None, "only a running generation can be left"
    workers = [w for w in draft.live.workers.values() if w.generation == generation.number and not w.closed]
    for worker in workers:
        draft.act(AskToLeave(worker.session_id, generation.number, reason, save))
    if save and workers:
        draft.set_live(save_asked=True)
    return bool(workers)


def ask_to_save(draft: Draft, reason: str) -> bool:
    """Ask the generation's rank 0 for a checkpoint. False if it cannot be asked."""
    generation = draft.record.generation
    for worker in draft.live.workers.values():
        if generation and worker.generation == generation.number and worker.rank == 0 and not worker.closed:
            draft.act(AskToSave(worker.session_id, generation.number, reason))
            draft.set_live(save_asked=True)
            return True
    return False


def stop_members(draft: Draft, reason: str) -> None:
    """End the generation for all members that still run in it."""
    generation = draft.record.generation
    assert generation is not None, "only a generation that began can be stopped"
    for node in draft.members():
        if node.succeeded or is_ready(draft, node):
            continue
        if not draft.record.in_process:
            draft.act(StopWorkers(node.node_id, generation.number, reason))
            continue
        for worker in workers_of(draft, node.node_id):
            if worker.ready is None:
                cut(draft, worker, reason)


def cut(draft: Draft, worker: WorkerSession, reason: str) -> None:
    """Tell a live worker that its generation is broken."""
    change_worker(draft, worker.session_id, cut_s=draft.now_s)
    draft.act(CutGeneration(worker.session_id, worker.generation, reason))


def forget_workers(draft: Draft, node_id: str) -> None:
    """The node's workers are gone, or about to be; what others said of them is not said of those that follow."""
    draft.set_live(workers=draft.live.workers.without(draft.live.workers.of(node_id)))
    if draft.record.nodes[node_id].spoken:
        draft.change(node_id, spoken=())
    partition.forget(draft, node_id)


def seat(draft: Draft, worker: WorkerSession, request_id: int, generation: Generation, rank: int) -> None:
    """Answer a live worker's request: it is in that generation from now on."""
    seated = replace(
        worker,
        generation=generation.number,
        rank=rank,
        ready=None,
        cut_s=None,
        heard_s=draft.now_s,
        pace=NO_PACE,
        paced_s=draft.now_s,
        slow_step=0,
    )
    put_worker(draft, seated)
    draft.act(AssignWorker(worker.session_id, request_id, generation, rank))


def put_worker(draft: Draft, worker: WorkerSession) -> None:
    draft.set_live(workers=draft.live.workers.with_(worker))


def change_worker(draft: Draft, session_id: str, **changes: object) -> None:
    """Set fields of a known worker session."""
    put_worker(draft, changed(draft.live.workers[session_id], **changes))
