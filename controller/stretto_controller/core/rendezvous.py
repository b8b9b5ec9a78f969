"""How a generation is chosen, begun and ended."""

from __future__ import annotations

from collections.abc import Sequence

from stretto_controller.core import partition, readiness
from stretto_controller.core.actions import (
    Assign,
    BeginGeneration,
    Dismiss,
    EndGeneration,
    FinishGeneration,
)
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import (
    Cause,
    Change,
    Generation,
    Member,
    Node,
    NodeState,
    Phase,
    Ready,
    Seat,
    Version,
    WorkerSession,
)
from stretto_controller.core.roster import Roster


def assign_ranks(draft: Draft, nodes: Sequence[Node], reason: str) -> Generation:
    """Ranks 0..n-1 in the given order, without gaps; slots may be unequal."""
    members = []
    first_rank = 0
    workers: list[WorkerSession] = []
    for node_rank, node in enumerate(nodes):
        ready = node.ready or Ready(0)
        own = readiness.workers_of(draft, node.node_id) if draft.record.in_process else []
        workers += own
        seats = [Seat(w.ready.request_id, w.ready.store_port, w.ready.preflight_port) for w in own if w.ready]
        members.append(
            Member(
                node_id=node.node_id,
                node_rank=node_rank,
                slots=node.slots,
                first_rank=first_rank,
                address=node.address,
                master_port=ready.master_port,
                store_port=ready.store_port,
                seats=tuple(seats),
            )
        )
        first_rank += node.slots
    source_rank, in_step = choose_source(draft, workers)
    scale = draft.record.spec.scale(first_rank)
    # What a checkpoint does not have is done again.
    first_tau = _known_tau(draft) if source_rank >= 0 else _saved_tau(draft)
    return Generation(draft.record.next_generation, tuple(members), scale, reason, first_tau, source_rank, in_step)


def choose_source(draft: Draft, workers: Sequence[WorkerSession]) -> tuple[int, bool]:
    """The rank of the worker with the newest state, and whether all have that very state; (-1, False) if none may give.

    A stale process that comes back has a state of an older generation, however many steps it did alone: it never
    becomes the source, and where training is known to have gone beyond it, the newest checkpoint is better.
    """
    versions = [w.ready.version for w in workers if w.ready is not None]
    newest = max(versions, default=Version())
    if newest == Version() or newest < draft.record.lineage:
        return -1, False
    return versions.index(newest), all(version == newest for version in versions)


def choose(draft: Draft, *, though_paused: bool = False) -> list[Node]:
    """Who should be in the next generation: members first, by rank, then waiting nodes as they came.

    Members keep their order, so ranks are as stable as they can be; what is beyond the wanted number waits.
    """
    if draft.record.paused and not though_paused:
        return []
    staying = [n for n in draft.members() if n.state is NodeState.ACTIVE and not n.succeeded]
    known = {n.node_id for n in draft.members()}
    waiting = [n for n in waiting_nodes(draft) if n.node_id not in known]
    return with_the_state(draft, together(draft, staying + waiting))


def together(draft: Draft, nodes: Sequence[Node]) -> list[Node]:
    """Those of the nodes that can all reach each other."""
    newest = max(draft.record.lineage, Version(0, 1))
    # Those who train hold it, all of them.
    train = draft.record.phase is Phase.RUNNING
    holding = [] if train else [n.node_id for n in nodes if readiness.version(draft, n) >= newest]
    return partition.keep_apart(draft, nodes, holding)


def with_the_state(draft: Draft, nodes: Sequence[Node]) -> list[Node]:
    """The first of these nodes, as many as are wanted, and among them one whose live workers hold the newest state."""
    chosen = list(nodes[: draft.record.wanted_nodes])
    if draft.record.phase is Phase.RUNNING or not chosen:
        # Those who train hold it.
        return chosen
    newest = max(readiness.version(draft, n) for n in nodes)
    if newest >= max(draft.record.lineage, Version(0, 1)) > max(readiness.version(draft, n) for n in chosen):
        chosen[-1] = next(n for n in nodes if readiness.version(draft, n) == newest)
    return chosen


def waiting_nodes(draft: Draft) -> list[Node]:
    """Connected nodes that asked for an assignment, in the order in which they came."""
    return [
        n
        for n in draft.present()
        if n.state is not NodeState.DRAINING
        and draft.connected(n.node_id)
        and readiness.is_ready(draft, n)
        and readiness.speaks(draft, n)
    ]


def form(draft: Draft, nodes: Sequence[Node], cause: Cause, reason: str, guilty: frozenset[str] = frozenset()) -> None:
    """Begin the next generation with these nodes, all of which are ready. guilty: whose own failure ended the last."""
    generation, before = assign_ranks(draft, nodes, reason), draft.record.generation
    if draft.record.phase in (Phase.PAUSED, Phase.WAITING):
        # The time that was spent waiting, on a person or for nodes, is no part of the change.
        draft.set_live(pause_started_s=draft.now_s)
    draft.update(generation=generation, next_generation=generation.number + 1, change=None)
    if draft.record.in_process and generation.source_rank < 0:
        # It may train where we cannot see it: what it did not begin with is not gone back to.
        draft.update(lineage=Version(generation.number, 0))
    draft.set_live(
        step=0,
        step_advanced_s=None,
        failure_s=None,
        roll_call_until_s=None,
        pause_s=None,
        cause=cause,
        settle_until_s=None,
        settle_limit_s=None,
        change_limit_s=None,
        waiting_until_s=None,
        holder_until_s=None,
    )
    draft.enter(Phase.RUNNING, reason)
    draft.act(BeginGeneration(generation, cause))
    if draft.record.in_process:
        _seat_workers(draft, generation)
        if before is not None and generation.source_rank >= 0:
            _save_at_the_minimum(draft, before, generation)
    else:
        _answer_agents(draft, nodes, generation, guilty)
    for node in draft.present():
        if not generation.has(node.node_id) and node.state is not NodeState.DRAINING:
            draft.change(node.node_id, state=NodeState.SPARE)


def _answer_agents(draft: Draft, nodes: Sequence[Node], generation: Generation, guilty: frozenset[str]) -> None:
    draft.set_live(workers=Roster())
    for node in nodes:
        assert node.ready is not None, f"{node.node_id} is assigned without having asked"
        request_id = node.ready.request_id
        draft.change(node.node_id, state=NodeState.ACTIVE, ready=None, succeeded=False, answered_request=request_id)
        draft.act(Assign(node.node_id, request_id, generation, node.node_id in guilty))


def _seat_workers(draft: Draft, generation: Generation) -> None:
    for member in generation.members:
        draft.change(member.node_id, state=NodeState.ACTIVE, succeeded=False)
        for worker in readiness.workers_of(draft, member.node_id):
            assert worker.ready is not None, f"{worker.session_id} is assigned without having asked"
            rank = member.first_rank + worker.local_rank
            readiness.seat(draft, worker, worker.ready.request_id, generation, rank)


def _save_at_the_minimum(draft: Draft, before: Generation, generation: Generation) -> None:
    """One loss more, and nobody may hold the state."""
    if len(generation.members) == draft.record.spec.min_nodes < len(before.members):
        readiness.ask_to_save(draft, "the job has shrunk to its minimum")


def at_fault(draft: Draft) -> frozenset[str]:
    """Whose own failure ended the generation, of the members whose workers failed.

    Nobody's, if a member was lost or drained: that alone breaks the others' collectives. A worker that a signal ended
    is the cause of the others' failures; if there is none, all are counted, as torchrun does.
    """
    change = draft.record.change
    if change is not None and (change.gone or change.drained):
        return frozenset()
    failed = [(n.node_id, n.ready) for n in draft.members() if n.ready is not None and n.ready.failed]
    signalled = [node_id for node_id, ready in failed if ready.exit_signal]
    return frozenset(signalled or [node_id for node_id, _ in failed])


def dismiss_exhausted(draft: Draft, guilty: frozenset[str]) -> bool:
    """Send home the guilty nodes that have no restart left. True if there were any."""
    exhausted = [
        n for n in draft.members() if n.node_id in guilty and n.ready is not None and n.ready.restarts_left == 0
    ]
    for node in exhausted:
        reason = "its workers failed and no restarts are left"
        draft.log("node_failed", f"{node.node_id}: {reason}", node_id=node.node_id)
        draft.dismiss(node.node_id, success=False, reason=reason)
        draft.remove(node.node_id)
    return bool(exhausted)


def must_save(draft: Draft) -> bool:
    """Who leaves must write a checkpoint: in in-process mode only if no member goes on and keeps the state."""
    if not draft.record.in_process:
        return True
    chosen = {n.node_id for n in choose(draft)}
    return not any(n.node_id in chosen for n in draft.members())


def plan(draft: Draft, cause: Cause, reason: str) -> None:
    """Ask the workers that can to leave at a step boundary; where none can, their agents stop them."""
    generation = draft.record.generation
    assert generation is not None, "a change is planned only where a generation runs"
    save = must_save(draft)
    if not readiness.ask_to_leave(draft, reason, save=save):
        stop(draft, cause, reason, planned=True)
        return
    draft.update(change=Change(cause, reason, planned=True, leaving=True, save=save))
    step_s = max(w.pace.median_step_s for w in draft.live.workers.values())
    limit_s = max(draft.limits.leave_limit_s, draft.limits.slow_factor * step_s)
    draft.set_live(change_limit_s=draft.now_s + limit_s, settle_until_s=None, settle_limit_s=None)
    draft.log("change_planned", reason)


def stop(draft: Draft, cause: Cause, reason: str, *, planned: bool, gone: tuple[str, ...] = ()) -> None:
    """End the current generation: all members stop their workers and ask again."""
    generation = draft.record.generation
    assert generation is not None, "only a running generation can be stopped"
    end(draft, reason)
    drained = draft.record.change.drained if draft.record.change else ()
    draft.update(change=Change(cause, reason, planned, gone=gone, drained=drained))
    limit_s = draft.limits.late_limit_s if draft.record.in_process else draft.limits.stop_limit_s
    draft.set_live(
        change_limit_s=draft.now_s + limit_s,
        pause_started_s=draft.now_s,
        settle_until_s=None,
        settle_limit_s=None,
    )
    draft.enter(Phase.RECONFIGURING, reason)
    readiness.stop_members(draft, reason)


def _known_tau(draft: Draft) -> float:
    """The newest tau heard of; after a restart of the controller, at least that of the newest checkpoint."""
    progress = draft.live.progress
    return max(progress.tau if progress else 0.0, _saved_tau(draft))


def _saved_tau(draft: Draft) -> float:
    checkpoint = draft.record.checkpoint
    return checkpoint.tau if checkpoint else 0.0


def end(draft: Draft, reason: str) -> None:
    """Close the books on the current generation."""
    generation, live = draft.record.generation, draft.live
    assert generation is not None, "only a generation that began can end"
    progress = live.progress if live.progress and live.progress.generation == generation.number else None
    steps = progress.generation_steps if progress else 0
    draft.act(
        EndGeneration(
            generation=generation,
            steps_before=progress.generation_first_step if progress else 0,
            steps=steps,
            first_tau=progress.generation_first_tau if progress else 0.0,
            mean_gain=progress.generation_gain_sum / steps if progress and steps else 0.0,
            effective_lr=progress.effective_lr[0] if progress and progress.effective_lr else 0.0,
            last_tau=progress.tau if progress else generation.first_tau,
            pause_s=live.pause_s or 0.0,
            reason=reason,
        )
    )


def finish(draft: Draft, phase: Phase, reason: str) -> None:
    """End the job: release everyone."""
    generation = draft.record.generation
    if generation is not None and draft.record.phase is Phase.RUNNING:
        end(draft, reason)
    draft.update(change=None)
    draft.enter(phase, reason)
    success = phase is Phase.SUCCEEDED
    for node in draft.present():
        if generation is not None and node.succeeded:
            draft.act(FinishGeneration(node.node_id, generation.number))
        else:
            draft.act(Dismiss(node.node_id, success, reason))
