"""Facts from the training processes: their progress, and their answers to a change."""

from __future__ import annotations

from dataclasses import replace

from stretto_controller.core import events as ev
from stretto_controller.core import liveness, membership, partition, readiness
from stretto_controller.core.actions import (
    AskToLeave,
    CloseSession,
    FenceWorker,
    FirstStep,
    ReachTarget,
    SaveAndExit,
    WelcomeWorker,
)
from stretto_controller.core.changed import changed
from stretto_controller.core.draft import Draft
from stretto_controller.core.errors import Rejected
from stretto_controller.core.model import (
    Cause,
    Generation,
    Node,
    NodeState,
    Phase,
    Seat,
    Version,
    WorkerReady,
    WorkerSession,
)
from stretto_controller.core.report import Checkpoint, Progress


def hello(draft: Draft, event: ev.WorkerHello) -> None:
    """A worker opens a stream: its first, or again after a break."""
    generation = draft.record.generation
    current = generation is not None and event.generation == generation.number
    if not draft.record.in_process:
        if event.generation == 0:
            raise _needs_in_process(draft)
        if generation is None or not current or draft.record.phase not in (Phase.RUNNING, Phase.RECONFIGURING):
            _fence(draft, event.session_id, event.generation)
            return
    elif draft.record.phase.finished:
        _send_home(draft, event)
        return
    else:
        current = _check_node(draft, event) and current
    if generation is not None and current:
        _check_rank(generation, event)
    _take_spec(draft, event)
    if draft.record.in_process:
        _end_a_drain_that_is_over(draft, event)
    _replace_streams(draft, event)
    number, rank = (event.generation, event.rank) if current else (0, -1)
    worker = WorkerSession(
        event.session_id, event.node_id, event.local_rank, rank, number, draft.now_s, paced_s=draft.now_s
    )
    readiness.put_worker(draft, worker)
    if draft.record.in_process:
        _note_speech(draft, event)
    draft.act(WelcomeWorker(event.session_id, draft.record.generation.scale if draft.record.generation else 0.0))
    membership.end_grace_when_all_are_back(draft)
    _note_number(draft, event.generation)
    if event.ready is not None:
        take_ready(draft, worker, event.ready)
    elif event.generation and not current:
        _fence(draft, event.session_id, event.generation)
        readiness.change_worker(draft, event.session_id, cut_s=draft.now_s)
    elif current:
        _tell_of_the_change(draft, worker)


def _note_speech(draft: Draft, event: ev.WorkerHello) -> None:
    spoken = draft.record.nodes[event.node_id].spoken
    if event.local_rank not in spoken:
        draft.change(event.node_id, spoken=tuple(sorted((*spoken, event.local_rank))))


def _needs_in_process(draft: Draft) -> Rejected:
    return Rejected.precondition(
        f"job {draft.record.name} runs in restart mode, and this worker asks for a place as live workers do; "
        "start all of the job's agents with --rdzv-conf=reconfigure=in-process (or `stretto run`), under a new job name"
    )


def _send_home(draft: Draft, event: ev.WorkerHello) -> None:
    """The job has finished while this live worker was away. A state that nobody else keeps is worth a checkpoint."""
    record = draft.record
    draft.act(WelcomeWorker(event.session_id, 0.0))
    if record.phase is Phase.FAILED:
        draft.act(SaveAndExit(event.session_id, record.reason))
    else:
        draft.act(FenceWorker(event.session_id, event.generation, f"job {record.name} is {record.phase}"))


def _check_node(draft: Draft, event: ev.WorkerHello) -> bool:
    """Whether the node may have workers in the current generation. Raises Rejected if it may have none at all."""
    node = draft.record.nodes.get(event.node_id)
    if node is None or node.state is NodeState.LOST:
        raise Rejected.not_yet(f"node {event.node_id} is not known; its agent has to say hello first")
    if event.local_rank >= node.slots:
        raise Rejected.invalid(f"local rank {event.local_rank} is not below {node.slots}, the slots of {event.node_id}")
    if node.ending:
        raise Rejected.not_yet(f"the workers of {event.node_id} are being ended; new ones will be let start")
    return node.state is not NodeState.JOINING


def _check_rank(generation: Generation, event: ev.WorkerHello) -> None:
    for member in generation.members:
        if member.node_id == event.node_id:
            if event.rank == member.first_rank + event.local_rank and event.local_rank < member.slots:
                return
            raise Rejected.invalid(
                f"rank {event.rank} is not local rank {event.local_rank} of node {event.node_id}, which has "
                f"{member.slots} ranks from {member.first_rank}"
            )
    raise Rejected.not_found(f"node {event.node_id} is not in generation {generation.number}")


def _take_spec(draft: Draft, event: ev.WorkerHello) -> None:
    spec = draft.record.spec.merged(event.spec)
    draft.update(spec=spec)
    if draft.record.generation is not None:
        generation, scale = draft.record.generation, spec.scale(draft.record.generation.world_size)
        if generation.scale != scale:
            draft.update(generation=replace(generation, scale=scale))


def _replace_streams(draft: Draft, event: ev.WorkerHello) -> None:
    """One stream per worker: an older one of the same seat is closed and forgotten."""
    older = [w for w in draft.live.workers.of(event.node_id) if w.local_rank == event.local_rank]
    for worker in older:
        if not worker.closed and worker.session_id != event.session_id:
            draft.act(CloseSession(worker.session_id))
    draft.set_live(workers=draft.live.workers.without(older))


def _end_a_drain_that_is_over(draft: Draft, event: ev.WorkerHello) -> None:
    """A process that never trained calls from a node whose workers had SIGTERM and have been let go: its agent stays.

    The word of one that has ended may come later than the agent's question that followed its end.
    """
    node, ready = draft.record.nodes[event.node_id], event.ready
    anew = ready is not None and ready.generation == 0 and ready.version == Version()
    others = draft.live.workers.of(event.node_id)
    if anew and not others and node.state is NodeState.DRAINING and not node.drain_requested:
        draft.change(node.node_id, state=NodeState.JOINING)


def _fence(draft: Draft, session_id: str, number: int) -> None:
    generation = draft.record.generation
    current = generation.number if generation else "none"
    draft.act(FenceWorker(session_id, number, f"generation {number} is over (current: {current})"))


def _tell_of_the_change(draft: Draft, worker: WorkerSession) -> None:
    change = draft.record.change
    if change is None:
        return
    if draft.record.phase is Phase.RECONFIGURING and draft.record.in_process:
        readiness.cut(draft, worker, change.reason)
    elif change.leaving or draft.record.phase is Phase.RECONFIGURING:
        save = change.save or not draft.record.in_process
        draft.act(AskToLeave(worker.session_id, worker.generation, change.reason, save))


def asked(draft: Draft, event: ev.WorkerAsked) -> None:
    if not draft.record.in_process:
        raise _needs_in_process(draft)
    worker = _heard(draft, event.session_id)
    if worker is not None:
        take_ready(draft, worker, event.ready)


def take_ready(draft: Draft, worker: WorkerSession, ready: WorkerReady) -> None:
    """A live worker asks for its place in the next generation, perhaps not for the first time."""
    generation = draft.record.generation
    if worker.ready == ready:
        return
    if _seat_of(draft, worker, ready) is not None:
        draft.repeated_by = (worker.session_id, ready)
        return
    if generation is not None and ready.generation == generation.number and ready.failed:
        _note_failure(draft, worker, generation, ready)
    _note_number(draft, ready.generation)
    readiness.change_worker(draft, worker.session_id, ready=ready, cut_s=None)


def answer_again(draft: Draft) -> bool:
    """Send a repeated question its answer again. False if that generation is over by now: it is then a new one."""
    assert draft.repeated_by is not None, "only a repeated question is answered again"
    (session_id, ready), draft.repeated_by = draft.repeated_by, None
    worker, generation = draft.live.workers.get(session_id), draft.record.generation
    if worker is None:
        return True
    rank = _seat_of(draft, worker, ready)
    if rank is None or generation is None:
        readiness.change_worker(draft, session_id, ready=ready, cut_s=None)
        return False
    readiness.seat(draft, worker, ready.request_id, generation, rank)
    _tell_of_the_change(draft, draft.live.workers[session_id])
    return True


def _seat_of(draft: Draft, worker: WorkerSession, ready: WorkerReady) -> int | None:
    """The rank that this very request was given already: the answer was lost on its way."""
    node, generation = draft.record.nodes[worker.node_id], draft.record.generation
    if draft.record.phase is not Phase.RUNNING or generation is None or node.state is NodeState.JOINING:
        return None
    asked = Seat(ready.request_id, ready.store_port, ready.preflight_port)
    for member in generation.members:
        if member.node_id == worker.node_id:
            return member.first_rank + worker.local_rank if asked == member.seats[worker.local_rank] else None
    return None


def _note_number(draft: Draft, number: int) -> None:
    """A controller that lost its data must not give a number, or call a state newest, that others went beyond."""
    draft.update(next_generation=max(draft.record.next_generation, number + 1))


def _note_failure(draft: Draft, worker: WorkerSession, generation: Generation, ready: WorkerReady) -> None:
    if draft.live.failure_s is None:
        draft.set_live(failure_s=draft.now_s)
        draft.log("generation_broken", f"a worker of {worker.node_id} lost its peers", node_id=worker.node_id)
    for member in generation.members:
        node = draft.record.nodes.get(member.node_id)
        if node is None or node.state is not NodeState.ACTIVE or node.node_id == worker.node_id:
            # Its workers are known to be gone: whoever follows them there may well be reached.
            continue
        ranks = range(member.first_rank, member.first_rank + member.slots)
        if any(rank in ranks for rank in ready.unreachable):
            partition.note(draft, worker.node_id, member.node_id)


def alive(draft: Draft, event: ev.WorkerAlive) -> None:
    worker = draft.live.workers.get(event.session_id)
    if worker is None:
        return
    now_s = draft.now_s
    if event.pace.generation and event.pace.generation == worker.generation:
        readiness.put_worker(draft, changed(worker, heard_s=now_s, pace=event.pace, paced_s=now_s))
    else:
        readiness.put_worker(draft, changed(worker, heard_s=now_s))


def _heard(draft: Draft, session_id: str) -> WorkerSession | None:
    """The worker that speaks on this stream, noted as alive."""
    if session_id not in draft.live.workers:
        return None
    readiness.change_worker(draft, session_id, heard_s=draft.now_s)
    return draft.live.workers[session_id]


def _current(draft: Draft, session_id: str) -> tuple[WorkerSession, Generation] | None:
    """The worker that speaks on this stream, if it is in the current generation."""
    worker, generation = _heard(draft, session_id), draft.record.generation
    if worker is None or generation is None or worker.generation != generation.number:
        return None
    return worker, generation


def closed(draft: Draft, event: ev.WorkerStreamClosed) -> None:
    if event.session_id in draft.live.workers:
        readiness.change_worker(draft, event.session_id, closed_s=draft.now_s)
        if draft.record.in_process:
            liveness.note_closure(draft)


def progressed(draft: Draft, event: ev.WorkerProgressed) -> None:
    progress, found = event.progress, _current(draft, event.session_id)
    if found is None or progress.generation != found[1].number or progress.step < draft.live.step:
        return
    worker, generation = found
    if progress.step > draft.live.step:
        draft.set_live(step=progress.step, step_advanced_s=draft.now_s)
        if draft.live.pause_s is None:
            _first_step(draft, generation, progress)
    if worker.rank == 0:
        draft.set_live(progress=progress, progress_s=draft.now_s)


def _first_step(draft: Draft, generation: Generation, progress: Progress) -> None:
    draft.update(lineage=Version(generation.number, progress.step))
    if draft.record.phase is not Phase.RUNNING:
        # Its books are closed.
        return
    started_s = draft.live.pause_started_s
    pause_s = 0.0 if started_s is None else draft.now_s - started_s
    draft.set_live(pause_s=pause_s)
    cause, steps_before = draft.live.cause or Cause.START, progress.generation_first_step
    draft.act(FirstStep(generation.number, cause, pause_s, steps_before, progress.generation_first_tau))


def left(draft: Draft, event: ev.WorkerLeft) -> None:
    found = _current(draft, event.session_id)
    if found is not None and event.generation == found[1].number:
        readiness.change_worker(draft, event.session_id, left=True)


def finished(draft: Draft, event: ev.WorkerFinished) -> None:
    found = _current(draft, event.session_id)
    if found is None:
        return
    progress = draft.live.progress
    if draft.record.phase is not Phase.RUNNING or progress is None or progress.step < event.step:
        # Rank 0, which has told of less, may be gone; or an agent has told of the end before any worker.
        draft.act(ReachTarget(found[1].number, event.step, event.tau))
    if draft.record.target_reached:
        return
    draft.update(target_reached=True)
    draft.set_live(target_s=draft.now_s)
    draft.log("target_reached", f"tau {event.tau:.1f} reached at step {event.step}")


def draining(draft: Draft, event: ev.WorkerDraining) -> None:
    """A worker had SIGTERM: its agent is going, unless the agents are stopping their workers on our word."""
    worker = _heard(draft, event.session_id)
    if worker is None:
        return
    if draft.record.phase is not Phase.RUNNING and not draft.record.in_process:
        draft.act(FenceWorker(event.session_id, event.generation, draft.record.reason))
        return
    node = draft.record.nodes.get(worker.node_id)
    if node is not None and _may_drain(node):
        membership.drain(draft, worker.node_id, requested=False)


def _may_drain(node: Node) -> bool:
    return node.state in (NodeState.ACTIVE, NodeState.SPARE, NodeState.JOINING)


def checkpointed(draft: Draft, event: ev.CheckpointCommitted) -> None:
    generation = draft.record.generation
    worker = _heard(draft, event.session_id)
    if worker is None or not _counts(draft, generation, event.checkpoint):
        return
    if draft.record.checkpoint != event.checkpoint:
        before, checkpoint = draft.record.checkpoint, event.checkpoint
        draft.update(checkpoint=checkpoint)
        if draft.record.in_process:
            # Whoever has less goes on from there: it may be of a step that its writer alone had done.
            saved = Version(checkpoint.generation, checkpoint.step)
            draft.update(lineage=max(draft.record.lineage, saved))
        # One every few seconds would push what happened to the job out of its kept events.
        first = before is None or before.generation != checkpoint.generation
        if first or draft.live.save_asked or draft.live.target_s is not None:
            reason = f"step {checkpoint.step} is saved: {checkpoint.path}"
            draft.log("checkpoint_committed", reason, node_id=worker.node_id)
            draft.set_live(save_asked=False)


def checkpoint_failed(draft: Draft, event: ev.CheckpointFailed) -> None:
    found = _current(draft, event.session_id)
    if found is not None and event.generation == found[1].number:
        reason = f"no checkpoint of step {event.step}: {event.reason}"
        draft.log("checkpoint_failed", reason, node_id=found[0].node_id)


def checkpoint_requested(draft: Draft, event: ev.CheckpointRequested) -> None:
    asked = draft.record.phase is Phase.RUNNING and readiness.ask_to_save(draft, "a checkpoint was asked for")
    if not asked:
        raise Rejected.precondition(
            f"job {draft.record.name} is {draft.record.phase}, and no worker can save now; ask again when "
            "it trains. A job that is paused, or that has ended, was saved"
        )
    draft.log("checkpoint_requested", "a checkpoint was asked for")


def _counts(draft: Draft, generation: Generation | None, checkpoint: Checkpoint) -> bool:
    """Only the current generation may commit; where none is, live workers speak for the last one."""
    if generation is not None:
        return checkpoint.generation == generation.number
    return draft.record.in_process and checkpoint.generation == draft.record.next_generation - 1
