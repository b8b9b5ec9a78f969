"""The consequences: given all facts, what should the job do now? Idempotent: asked again, it changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stretto_controller.core import eviction, holders, readiness, rendezvous
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import FINISHED, Cause, Change, Node, NodeState, Phase
from stretto_controller.core.roster import Roster


def reconsider(draft: Draft) -> None:
    """Bring the job to the phase that the facts ask for."""
    eviction.name_the_slow(draft)
    begun = draft.record.next_generation
    for _ in range(len(Phase)):
        phase = draft.record.phase
        eviction.lose_the_silent(draft)
        eviction.end_the_hung(draft)
        holders.release_the_drained(draft)
        _CONSIDER[phase](draft)
        # A generation that has just begun is left alone until the next event: its members do not know of it yet.
        if draft.record.phase in (phase, *FINISHED) or draft.record.next_generation > begun:
            holders.release_the_drained(draft)
            return
    raise AssertionError(f"the phases of {draft.record.name} do not come to rest")


def _gathering(draft: Draft) -> None:
    """PENDING, FORMING, PAUSED: no generation runs; begin one when enough nodes wait."""
    record = draft.record
    if record.paused:
        draft.set_live(settle_until_s=None, settle_limit_s=None)
        draft.enter(Phase.PAUSED, "paused")
        return
    if _nobody_can_come_back(draft):
        return
    waiting = rendezvous.together(draft, rendezvous.waiting_nodes(draft))
    if len(waiting) < record.spec.min_nodes:
        draft.set_live(settle_until_s=None, settle_limit_s=None)
        if holders.holders(draft):
            holders.wait(draft)
            return
        draft.enter(Phase.PENDING, f"{len(waiting)} of at least {record.spec.min_nodes} nodes are there")
        return
    if holders.one_saves(draft):
        return
    cause = Cause.RESUME if record.phase is Phase.PAUSED else Cause.START
    if len(waiting) >= record.wanted_nodes or record.phase is Phase.PAUSED or _settled(draft, waiting):
        nodes = rendezvous.with_the_state(draft, waiting)
        if (holder := holders.awaited(draft, nodes)) is not None:
            draft.enter(Phase.FORMING, f"{holder.node_id} keeps the newest state, and cannot take part yet")
            return
        verb = "resumed" if cause is Cause.RESUME else "started"
        rendezvous.form(draft, nodes, cause, f"{verb} with {_nodes(len(nodes))}")
    else:
        draft.enter(Phase.FORMING, f"{len(waiting)} of {record.wanted_nodes} nodes are there; more may come")


def _nobody_can_come_back(draft: Draft) -> bool:
    """The last node gave up: the job has failed."""
    if not draft.live.gave_up or draft.present():
        return False
    rendezvous.finish(draft, Phase.FAILED, "the workers of all nodes failed")
    return True


def _settled(draft: Draft, waiting: Sequence[Node]) -> bool:
    """Whether the settle time after the latest join has passed; each join prolongs it, up to a limit."""
    live, limits, now_s = draft.live, draft.limits, draft.now_s
    newest = max(node.order for node in waiting)
    if live.settle_limit_s is None:
        draft.set_live(settle_limit_s=now_s + limits.settle_limit_s, settle_until_s=None, settle_order=-1)
    live = draft.live
    assert live.settle_limit_s is not None
    if newest > live.settle_order:
        draft.set_live(settle_until_s=min(now_s + limits.settle_s, live.settle_limit_s), settle_order=newest)
    live = draft.live
    assert live.settle_until_s is not None
    return now_s >= live.settle_until_s


def _running(draft: Draft) -> None:
    """RUNNING: is the membership still what it should be?"""
    generation = draft.record.generation
    assert generation is not None, "a running job has a generation"
    if _ended(draft):
        return
    members = draft.members()
    if draft.record.target_reached or any(n.succeeded for n in members):
        # The job is ending: no planned change begins any more, and nobody has to have left by a certain time.
        draft.set_live(settle_until_s=None, settle_limit_s=None, change_limit_s=None)
    if draft.record.target_reached:
        return
    missing = _missing(draft)
    broken = [n for n in members if readiness.is_broken(draft, n) and n.state is NodeState.ACTIVE]
    if missing:
        rendezvous.stop(draft, Cause.NODE_LOST, f"{_list(missing)} gone", planned=False, gone=missing)
    elif broken:
        names = _list([n.node_id for n in broken])
        what = "lost their peers" if draft.record.in_process else "failed"
        rendezvous.stop(draft, Cause.WORKER_FAILED, f"workers of {names} {what}", planned=False)
    elif draft.record.change is not None:
        _leave(draft, draft.record.change)
    elif not any(n.succeeded for n in members):
        _consider_change(draft)


def _missing(draft: Draft) -> tuple[str, ...]:
    """Members that went without having done their part, and without having drained."""
    generation, change = draft.record.generation, draft.record.change
    assert generation is not None
    excused = change.drained if change is not None else ()
    return tuple(n for n in generation.node_ids if n not in excused and not _accounted(draft, n))


def _accounted(draft: Draft, node_id: str) -> bool:
    """The member is there, or has done its part."""
    node = draft.record.nodes.get(node_id)
    return node is not None and (node.succeeded or node.state in (NodeState.ACTIVE, NodeState.DRAINING))


def _leave(draft: Draft, change: Change) -> None:
    """The workers are asked to leave: when all have, or their time is up, the generation ends."""
    overdue = draft.live.change_limit_s is not None and draft.now_s >= draft.live.change_limit_s
    if readiness.all_left(draft) or overdue:
        rendezvous.stop(draft, change.cause, change.reason, planned=True)
    elif not change.save and rendezvous.must_save(draft):
        # Since they were asked, the last who would have kept the state is going, too.
        readiness.ask_to_leave(draft, change.reason, save=True)
        draft.update(change=replace(change, save=True))


def _consider_change(draft: Draft) -> None:
    """Grow, shrink, drain or pause at a step boundary, if the wanted membership differs."""
    generation = draft.record.generation
    assert generation is not None
    chosen = [n.node_id for n in rendezvous.choose(draft)]
    for node in rendezvous.waiting_nodes(draft):
        if node.state is NodeState.JOINING and node.node_id not in chosen:
            draft.change(node.node_id, state=NodeState.SPARE)
    current = list(generation.node_ids)
    if chosen == current:
        draft.set_live(settle_until_s=None, settle_limit_s=None)
        return
    cause, reason = _why(draft, current, chosen)
    if cause is Cause.GROW and len(chosen) < draft.record.wanted_nodes:
        joining = [draft.record.nodes[node_id] for node_id in chosen if node_id not in current]
        if not _settled(draft, joining):
            return
    rendezvous.plan(draft, cause, reason)


def _why(draft: Draft, current: Sequence[str], chosen: Sequence[str]) -> tuple[Cause, str]:
    if draft.record.paused:
        return Cause.PAUSE, "paused"
    draining = [n.node_id for n in draft.members() if n.state is NodeState.DRAINING]
    if draining:
        return Cause.DRAIN, f"{_list(draining)} {'drains' if len(draining) == 1 else 'drain'}"
    joining = [node_id for node_id in chosen if node_id not in current]
    if joining:
        return (
            Cause.GROW,
            f"{_list(joining)} {'joins' if len(joining) == 1 else 'join'}: {_nodes(len(current))} -> {len(chosen)}",
        )
    return Cause.SHRINK, f"{_nodes(draft.record.wanted_nodes)} wanted: {len(current)} -> {len(chosen)}"


def _reconfiguring(draft: Draft) -> None:
    """RECONFIGURING: as soon as all who stay are ready, begin the next generation."""
    if _ended(draft):
        return
    if draft.record.target_reached:
        # Who reached it ends when it likes; the others need no generation any more.
        draft.set_live(change_limit_s=None)
        return
    change = draft.record.change
    assert change is not None, "a job that reconfigures knows why"
    awaited = [
        n
        for n in draft.members()
        if n.state is NodeState.ACTIVE and not n.succeeded and not readiness.is_ready(draft, n)
    ]
    if awaited and not _overdue(draft, awaited):
        return
    for node in awaited:
        eviction.leave_behind(draft, node)
    if holders.one_saves(draft):
        draft.set_live(change_limit_s=None)
        return
    guilty = rendezvous.at_fault(draft)
    exhausted = rendezvous.dismiss_exhausted(draft, guilty)
    # A pause is of a state that is saved: where it came upon a failure, a generation begins in order to save it.
    chosen = rendezvous.choose(draft, though_paused=holders.kept_by_failure(draft))
    nodes = [n for n in chosen if readiness.is_ready(draft, n) and _reachable(draft, n)]
    if nodes and len(nodes) >= draft.record.spec.min_nodes:
        if holders.awaited(draft, nodes) is not None:
            draft.set_live(change_limit_s=None)
            return
        change = draft.record.change or change
        cause, reason = change.cause, change.reason
        if change.gone and not change.planned:
            cause = Cause.NODE_LOST
            reason = f"{_list(change.gone)} gone: training goes on with {_nodes(len(nodes))}"
        rendezvous.form(draft, nodes, cause, reason, guilty)
        return
    if exhausted and not draft.present():
        rendezvous.finish(draft, Phase.FAILED, "the workers of all nodes failed, and no restarts are left")
        return
    draft.update(generation=None, change=None)
    draft.set_live(
        change_limit_s=None, settle_until_s=None, settle_limit_s=None, failure_s=None, roll_call_until_s=None
    )
    if not draft.record.in_process:
        draft.set_live(workers=Roster())
    _gathering(draft)


def _overdue(draft: Draft, awaited: Sequence[Node]) -> bool:
    """Whether those who are awaited had their time; not while we may have lost their streams ourselves."""
    live = draft.live
    if live.change_limit_s is None or draft.now_s < live.change_limit_s:
        return False
    recovering = live.grace_until_s is not None and draft.now_s < live.grace_until_s
    away = any(len(readiness.workers_of(draft, n.node_id)) < n.slots for n in awaited)
    if draft.record.in_process and recovering and away:
        draft.set_live(change_limit_s=live.grace_until_s)
        return False
    return True


def _reachable(draft: Draft, node: Node) -> bool:
    """In in-process mode the workers' own streams say it; their agent may be away for a moment."""
    return draft.record.in_process or draft.connected(node.node_id)


def _waiting(draft: Draft) -> None:
    """WAITING: go on as soon as enough nodes are there; give up, saved, when the limit passes."""
    live = draft.live
    nodes, holding = rendezvous.choose(draft), holders.holders(draft)
    recovering = live.grace_until_s is not None and draft.now_s < live.grace_until_s
    if draft.record.paused or not (holding or recovering):
        draft.set_live(waiting_until_s=None)
        _gathering(draft)
    elif len(nodes) >= draft.record.spec.min_nodes:
        if holders.awaited(draft, nodes) is None:
            rendezvous.form(draft, nodes, Cause.GROW, f"training goes on with {_nodes(len(nodes))}")
    elif live.waiting_until_s is not None and draft.now_s >= live.waiting_until_s:
        holders.give_up(draft)
    elif holding:
        holders.wait(draft)


def _ended(draft: Draft) -> bool:
    """All members have done their part, or the target is reached and nobody is left to wait for."""
    generation = draft.record.generation
    assert generation is not None
    known = [n for n in (draft.record.nodes.get(node_id) for node_id in generation.node_ids) if n is not None]
    succeeded = [n for n in known if n.succeeded]
    rest = [n for n in known if not n.succeeded and n.state in (NodeState.ACTIVE, NodeState.DRAINING)]
    failed = [n for n in rest if readiness.is_ready(draft, n) or _only_asks(draft, n)]
    if len(failed) < len(rest):
        return False
    if draft.record.target_reached:
        # Live workers that ask again failed in nothing but the last collective. Whose workers failed starts new ones.
        asking = failed if draft.record.in_process else []
        crashed = [n for n in known if n.state is NodeState.JOINING] if draft.record.in_process else failed
        phase = Phase.FAILED if crashed and not succeeded and not asking else Phase.SUCCEEDED
        reason = "target reached" if phase is Phase.SUCCEEDED else "workers failed after the target was reached"
        rendezvous.finish(draft, phase, reason)
        return True
    if succeeded and not failed:
        rendezvous.finish(draft, Phase.SUCCEEDED, f"the workers of {_nodes(len(succeeded))} ended well")
        return True
    return False


def _only_asks(draft: Draft, node: Node) -> bool:
    """In-process mode, the target reached: of the node's workers, those that have not ended ask for a place."""
    own = readiness.workers_of(draft, node.node_id)
    return draft.record.in_process and draft.record.target_reached and bool(own) and all(w.ready for w in own)


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _list(names: Sequence[str]) -> str:
    """At most three names, so that a reason stays a line."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _finished(draft: Draft) -> None:
    raise AssertionError("a finished job is not reconsidered")


_CONSIDER = {
    Phase.PENDING: _gathering,
    Phase.FORMING: _gathering,
    Phase.PAUSED: _gathering,
    Phase.WAITING: _waiting,
    Phase.RUNNING: _running,
    Phase.RECONFIGURING: _reconfiguring,
    Phase.SUCCEEDED: _finished,
    Phase.FAILED: _finished,
}
