"""`step`: the one place where a job's state changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stretto_controller.core import events as ev
from stretto_controller.core import liveness, membership, pace, quiet, workers
from stretto_controller.core.actions import Decision, Dismiss, FenceWorker, Forget
from stretto_controller.core.draft import DISMISSED_KEPT, Draft
from stretto_controller.core.errors import Rejected
from stretto_controller.core.goodput import review
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, JobState, Phase, Record
from stretto_controller.core.reconsider import reconsider
from stretto_controller.core.transitions import NEXT, TABLE, Treatment


def step(name: str, state: JobState | None, event: ev.Event, *, now_s: float, limits: Limits) -> Decision:
    """The decision on one event. state None: no job of this name exists. Raises Rejected, and then nothing changed."""
    if state is None or _begins_again(state, event):
        state = _begin(name, state, event)
    draft = Draft(state, now_s, limits)
    treatment = TABLE[type(event)][state.record.phase]
    if treatment is Treatment.REFUSE:
        raise Rejected.precondition(f"job {name} is {state.record.phase}: {state.record.reason}")
    if treatment is Treatment.AGAIN and isinstance(event, ev.NodeHello):
        membership.returning(draft, event)
    elif treatment is Treatment.TAKE:
        liveness.forgive_stall(draft)
        liveness.note_lateness(draft)
        _FACTS[type(event)](draft, event)
        draft.quiet = quiet.changes_nothing_yet(draft, state, event)
        if not (draft.record.phase.finished or draft.quiet or isinstance(event, _WITHOUT_CONSEQUENCE)):
            reconsider(draft)
            if draft.repeated is not None and not membership.answer_again(draft):
                reconsider(draft)
            if draft.repeated_by is not None and not workers.answer_again(draft):
                reconsider(draft)
    before, after = state.record.phase, draft.record.phase
    assert after is before or after in _reachable(before), f"{before} cannot lead to {after}"
    return draft.decision()


# Signs of life are frequent, and by themselves change nothing; what they prevent, `next_wake_s` knows.
_WITHOUT_CONSEQUENCE = (
    ev.NodeHeartbeat,
    ev.WorkerAlive,
    ev.WorkerProgressed,
    ev.CheckpointFailed,
    ev.CheckpointRequested,
    ev.DeleteRequested,
)


def next_wake_s(state: JobState, limits: Limits) -> float | None:
    """When, in the controller's monotonic seconds, time alone can next change the state; None: never."""
    if state.record.phase.finished:
        return None
    live = state.live
    times = [
        liveness.next_loss_s(state, limits),
        pace.next_s(state, limits),
        live.settle_until_s,
        live.change_limit_s,
        live.waiting_until_s,
        live.holder_until_s,
    ]
    return min((t for t in times if t is not None), default=None)


def _reachable(phase: Phase) -> frozenset[Phase]:
    """One event may take several steps at once: an unplanned change with nobody to wait for, for example."""
    seen: set[Phase] = set()
    todo = [phase]
    while todo:
        new = NEXT[todo.pop()] - seen
        seen |= new
        todo += new
    return frozenset(seen)


def _begins_again(state: JobState, event: ev.Event) -> bool:
    """A finished name is used anew, unless it is only an agent of the finished job that was away."""
    if TABLE[type(event)][state.record.phase] is not Treatment.AGAIN:
        return False
    if isinstance(event, ev.NodeHello):
        return event.key_hash not in membership.farewells(state.record)
    return True


def _begin(name: str, finished: JobState | None, event: ev.Event) -> JobState:
    if not isinstance(event, ev.JobCreated | ev.NodeHello):
        raise Rejected.not_found(f"there is no job {name}; `stretto jobs list` shows those that exist")
    spec: JobSpec = event.spec
    spec.validate()
    if not spec.max_nodes:
        raise Rejected.invalid(f"job {name} does not exist yet: give its min_nodes and max_nodes to create it")
    if spec.mode is None:
        raise Rejected.invalid(f"job {name} does not exist yet: give its reconfigure mode to create it")
    record = Record(name=name, spec=spec, reason="created")
    if finished is not None:
        old = finished.record
        record = Record(
            name=name,
            spec=spec,
            reason="created",
            incarnation=old.incarnation + 1,
            next_generation=old.next_generation,
            # Its agents that come back later still are no part of this one; what their workers hold least of all.
            dismissed=dict(list(membership.farewells(old).items())[-DISMISSED_KEPT:]),
        )
    return JobState(record)


def _created(draft: Draft, event: ev.JobCreated) -> None:
    draft.update(spec=draft.record.spec.merged(event.spec))
    if event.desired_nodes:
        _scale(draft, event.desired_nodes)
    review.set_autoscale(draft, event.autoscale)
    draft.log("job_created", f"job {draft.record.name} was created")


def _scale(draft: Draft, nodes: int) -> None:
    spec = draft.record.spec
    if not spec.min_nodes <= nodes <= spec.max_nodes:
        raise Rejected.invalid(
            f"{nodes} nodes were asked for; job {draft.record.name} takes {spec.min_nodes} to {spec.max_nodes}"
        )
    if draft.record.wanted_nodes != nodes:
        draft.log("scale_requested", f"{nodes} nodes wanted instead of {draft.record.wanted_nodes}")
    draft.update(desired_nodes=nodes)


def _scale_requested(draft: Draft, event: ev.ScaleRequested) -> None:
    before = draft.record.wanted_nodes
    _scale(draft, event.nodes)
    if draft.record.wanted_nodes != before:
        review.scaled_by_hand(draft)


def _autoscale_requested(draft: Draft, event: ev.AutoscaleRequested) -> None:
    review.set_autoscale(draft, event.change)


def _size_reviewed(draft: Draft, event: ev.SizeReviewed) -> None:
    review.review(draft, review.Circumstances(event.wall_s, event.share))


def _pause(draft: Draft, event: ev.PauseRequested) -> None:
    if not draft.record.paused:
        draft.update(paused=True)
        draft.log("pause_requested", "pause requested")


def _resume(draft: Draft, event: ev.ResumeRequested) -> None:
    if draft.record.paused:
        draft.update(paused=False)
        draft.log("resume_requested", "resume requested")


def _drain(draft: Draft, event: ev.DrainRequested) -> None:
    membership.drain(draft, event.node_id, requested=True)


def _delete(draft: Draft, event: ev.DeleteRequested) -> None:
    """Everyone is sent home; the runner then forgets the job."""
    reason = f"job {draft.record.name} was deleted"
    generation = draft.record.generation.number if draft.record.generation else 0
    for worker in draft.live.workers.values():
        draft.act(FenceWorker(worker.session_id, generation, reason))
    for node in draft.present():
        draft.act(Dismiss(node.node_id, success=False, reason=reason))
    draft.act(Forget())
    draft.reason = reason


def _recovered(draft: Draft, event: ev.Recovered) -> None:
    draft.live = liveness.recovered_live(draft.record, draft.now_s, draft.limits)


def _tick(draft: Draft, event: ev.Tick) -> None:
    draft.set_live(ticked_s=draft.now_s)


_FACTS: Mapping[type, Callable[[Draft, Any], None]] = {
    ev.JobCreated: _created,
    ev.NodeHello: membership.hello,
    ev.NodeHeartbeat: membership.heartbeat,
    ev.NodeReady: membership.ready,
    ev.NodeSucceeded: membership.succeeded,
    ev.NodeLeft: membership.left,
    ev.StreamClosed: membership.closed,
    ev.WorkerHello: workers.hello,
    ev.WorkerStreamClosed: workers.closed,
    ev.WorkerAlive: workers.alive,
    ev.WorkerAsked: workers.asked,
    ev.WorkerProgressed: workers.progressed,
    ev.WorkerLeft: workers.left,
    ev.WorkerFinished: workers.finished,
    ev.WorkerDraining: workers.draining,
    ev.CheckpointCommitted: workers.checkpointed,
    ev.CheckpointFailed: workers.checkpoint_failed,
    ev.ScaleRequested: _scale_requested,
    ev.AutoscaleRequested: _autoscale_requested,
    ev.SizeReviewed: _size_reviewed,
    ev.PauseRequested: _pause,
    ev.ResumeRequested: _resume,
    ev.DrainRequested: _drain,
    ev.CheckpointRequested: workers.checkpoint_requested,
    ev.DeleteRequested: _delete,
    ev.Recovered: _recovered,
    ev.Tick: _tick,
}
