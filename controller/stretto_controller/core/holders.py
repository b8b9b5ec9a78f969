"""In-process mode: who keeps the newest state in memory, and how it is saved before the last of them goes."""

from __future__ import annotations

from collections.abc import Sequence

from stretto_controller.core import membership, readiness, rendezvous
from stretto_controller.core.actions import CloseSession, SaveAndExit
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import Node, NodeState, Phase, Version, WorkerSession


def holders(draft: Draft) -> list[Node]:
    """Nodes that stay and whose live workers hold the newest state."""
    if not draft.record.in_process:
        return []
    return [n for n in draft.present() if n.state is not NodeState.DRAINING and _holding(draft, n)]


def wait(draft: Draft) -> None:
    """Too few nodes are left: those that hold the state keep it until others come, or a limit passes."""
    count = len(rendezvous.waiting_nodes(draft))
    if draft.live.waiting_until_s is None:
        draft.set_live(waiting_until_s=draft.now_s + draft.limits.waiting_limit_s)
    reason = f"{count} of at least {draft.record.spec.min_nodes} nodes are there; they keep the state"
    draft.enter(Phase.WAITING, reason)


def give_up(draft: Draft) -> None:
    """Nobody came in time: the state is saved, and the job has failed."""
    reason = f"fewer than {draft.record.spec.min_nodes} nodes for {draft.limits.waiting_limit_s:g} s"
    _have_one_save(draft, [worker for node in holders(draft) for worker in _holding(draft, node)], reason)
    rendezvous.finish(draft, Phase.FAILED, reason)


def release_the_drained(draft: Draft) -> None:
    """A draining node goes as soon as no worker runs on it, and what only it holds is saved."""
    for node in draft.present():
        if node.state is not NodeState.DRAINING or readiness.is_running(draft, node):
            continue
        if draft.record.in_process and _keep_for_saving(draft, node):
            continue
        if node.drain_requested or not draft.record.in_process:
            draft.dismiss(node.node_id, success=True, reason="drained")
            membership.go(draft, node, f"{node.node_id} drained", kind="node_drained")
        else:
            # Its workers had SIGTERM, and may go now. Whether the node goes, too, only its agent knows: perhaps one of
            # its workers had crashed, and it will start them all again.
            _let_workers_go(draft, node)


def one_saves(draft: Draft) -> bool:
    """The last who holds the newest state writes it and exits; who comes after it starts from there."""
    return any(w.left and readiness.speaks(draft, node) for node in draft.present() for w in _holding(draft, node))


def awaited(draft: Draft, nodes: Sequence[Node]) -> Node | None:
    """Who keeps the newest state and cannot take part yet, where these nodes would begin from a checkpoint without it.

    It has come back by halves: a worker of it, or its agent, has yet to call. It has `late_limit_s` for that.
    """
    newest = max(draft.record.lineage, Version(0, 1))
    if not draft.record.in_process or any(readiness.version(draft, n) >= newest for n in nodes):
        return None
    able = {n.node_id for n in rendezvous.waiting_nodes(draft)}
    # Who is kept apart from the others could take part, but not with them.
    away = [n for n in holders(draft) if n.node_id not in able]
    # Who drains may be the last that has it, and is to say so first.
    away += [n for n in draft.members() if n.state is NodeState.DRAINING and readiness.is_running(draft, n)]
    keeping = next(iter(away), None)
    if keeping is None:
        return None
    if draft.live.holder_until_s is None:
        draft.set_live(holder_until_s=draft.now_s + draft.limits.late_limit_s)
    until_s = draft.live.holder_until_s
    return keeping if until_s is not None and draft.now_s < until_s else None


def kept_by_failure(draft: Draft) -> bool:
    """Who keeps the newest state lost its peers, rather than leaving with them, and no checkpoint has that state."""
    keeping = [worker for node in holders(draft) for worker in _holding(draft, node)]
    return any(w.ready is not None and w.ready.failed and not _is_saved(draft, w) for w in keeping)


def _holding(draft: Draft, node: Node) -> list[WorkerSession]:
    """The node's idle workers that hold the newest state."""
    newest = max(draft.record.lineage, Version(0, 1))
    workers = readiness.workers_of(draft, node.node_id)
    return [w for w in workers if w.ready is not None and w.ready.version >= newest]


def _keep_for_saving(draft: Draft, node: Node) -> bool:
    """Whether the node is still needed: nobody stays who has the newest state, and it is not saved.

    Of all that drain, one saves; should one that says later what it holds have more, it saves after that.
    """
    holding = _holding(draft, node)
    if (
        draft.record.phase is Phase.RUNNING
        or holders(draft)
        or all(_is_saved(draft, w) and not w.left for w in holding)
    ):
        return False
    if any(n.state is NodeState.ACTIVE and readiness.is_running(draft, n) for n in draft.members()):
        # They have not said yet what they hold.
        return True
    going = [n for n in draft.present() if n.state is NodeState.DRAINING and readiness.speaks(draft, n)]
    keeping = [worker for each in going for worker in _holding(draft, each)]
    if keeping and not any(worker.left for worker in keeping):
        _have_one_save(draft, keeping, f"{node.node_id} drains, and nobody else holds the state")
    return True


def _is_saved(draft: Draft, worker: WorkerSession) -> bool:
    checkpoint = draft.record.checkpoint
    assert worker.ready is not None, "who holds a state has asked"
    return checkpoint is not None and Version(checkpoint.generation, checkpoint.step) >= worker.ready.version


def _let_workers_go(draft: Draft, node: Node) -> None:
    for worker in readiness.workers_of(draft, node.node_id):
        draft.act(CloseSession(worker.session_id))
    readiness.forget_workers(draft, node.node_id)


def _have_one_save(draft: Draft, workers: Sequence[WorkerSession], reason: str) -> None:
    """One is enough, and two would write to one folder. The others end with their agents."""
    newest = max(workers, key=lambda w: w.ready.version if w.ready else Version())
    draft.act(SaveAndExit(newest.session_id, reason))
    readiness.change_worker(draft, newest.session_id, left=True, cut_s=draft.now_s)
