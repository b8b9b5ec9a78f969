"""What follows from silence and from waiting: who is named, who is ended by its agent, who is lost."""

from __future__ import annotations

from stretto_controller.core import liveness, membership, pace, readiness
from stretto_controller.core.actions import StopWorkers
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import JobState, Node, NodeState, WorkerSession


def name_the_slow(draft: Draft) -> None:
    """Say, once for each step, which live workers the others wait for; nothing is cut yet."""
    for lag in pace.lags(JobState(draft.record, draft.live), draft.limits):
        if lag.slow_s is None or lag.slow_s > draft.now_s:
            continue
        worker = lag.worker
        readiness.change_worker(draft, worker.session_id, slow_step=lag.step)
        draft.log(
            "worker_slow",
            f"{_named(worker)} is slow: others have waited {draft.now_s - lag.since_s:.1f} s for it "
            f"at step {lag.step}, and a step usually takes {lag.median_step_s:.3g} s",
            node_id=worker.node_id,
        )


def lose_the_silent(draft: Draft) -> None:
    """Nodes that showed no sign of life for too long."""
    liveness.note_silence(draft)
    for node in liveness.judge(draft):
        if draft.record.target_reached or node.succeeded:
            # It has done its part; nobody waits for it.
            if draft.record.in_process and draft.connected(node.node_id):
                # Its workers ended, or hang; its agent would wait for them.
                draft.dismiss(node.node_id, success=True, reason="the others have reached the target")
            draft.change(node.node_id, succeeded=True, state=NodeState.LOST)
        elif draft.record.in_process and liveness.is_heard(draft, node.node_id):
            _end_workers(draft, node, f"workers of {node.node_id} are lost: they did not answer")
        else:
            if draft.record.in_process and node.state is NodeState.DRAINING and not draft.connected(node.node_id):
                membership.go(draft, node, f"{node.node_id} drained", kind="node_drained")
                continue
            how = "its stream closed" if not draft.connected(node.node_id) else "it was silent"
            membership.go(draft, node, f"{node.node_id} is lost: {how}", kind="node_lost")


def end_the_hung(draft: Draft) -> None:
    """Live workers that speak, but for which the others have waited too long."""
    for lag in pace.lags(JobState(draft.record, draft.live), draft.limits):
        worker = lag.worker
        if lag.hung_s is None or lag.hung_s > draft.now_s or worker.session_id not in draft.live.workers:
            continue
        node = draft.record.nodes[worker.node_id]
        reason = (
            f"{_named(worker)} hangs: others have waited {draft.now_s - lag.since_s:.0f} s for it at step {lag.step}"
        )
        _end(draft, node, reason)
    for worker in list(draft.live.workers.values()):
        if pace.stuck_s(worker, draft.limits) <= draft.now_s and worker.session_id in draft.live.workers:
            reason = f"{_named(worker)} hangs: it was told that its generation is over, and has not left it"
            _end(draft, draft.record.nodes[worker.node_id], reason)
    for node in draft.present():
        if liveness.idle_lost_at_s(draft.record, draft.live, node, draft.limits) <= draft.now_s:
            _end_workers(draft, node, f"workers of {node.node_id} hang: they wait for their places, and say nothing")
    ended_s = pace.unended_s(JobState(draft.record, draft.live), draft.limits)
    if ended_s is not None and ended_s <= draft.now_s:
        for node in draft.members():
            if not node.succeeded and readiness.is_running(draft, node):
                _end(draft, node, f"workers of {node.node_id} hang: the target is reached, and they do not end")


def _end(draft: Draft, node: Node, reason: str) -> None:
    if liveness.is_heard(draft, node.node_id):
        _end_workers(draft, node, reason)
    else:
        membership.go(draft, node, reason, kind="node_lost")


def leave_behind(draft: Draft, node: Node) -> None:
    """The others wait no longer for a member that has not left the generation."""
    if draft.record.in_process:
        # It is alive, or it would be lost: when it comes to ask, it joins.
        draft.log("node_late", f"{node.node_id} is late: the others go on without it", node_id=node.node_id)
        membership.part(draft, node)
        return
    reason = f"{node.node_id} is lost: its workers did not stop in time"
    draft.dismiss(node.node_id, success=False, reason=reason)
    membership.go(draft, node, reason, kind="node_lost")


def _named(worker: WorkerSession) -> str:
    which = f"rank {worker.rank}" if worker.rank >= 0 else f"worker {worker.local_rank}"
    return f"{which} on {worker.node_id}"


def _end_workers(draft: Draft, node: Node, reason: str) -> None:
    """Its workers are gone or hang; its agent ends them, says so, and may start new ones."""
    generation = draft.record.generation
    number = generation.number if generation else 0
    draft.log("workers_lost", reason, node_id=node.node_id)
    draft.act(StopWorkers(node.node_id, number, reason, force=True))
    draft.change(node.node_id, ending=True)
    membership.part_from_workers(draft, draft.record.nodes[node.node_id])
