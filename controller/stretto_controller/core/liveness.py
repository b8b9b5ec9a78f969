"""Who is lost, and when that is known: pure judgements on silence, closed streams and advancing steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stretto_controller.core.draft import Draft
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobState, Live, Node, NodeState, Phase, Record, Session, WorkerSession
from stretto_controller.core.roster import Roster

# Nodes of one job that lose a stream within this time, and more than half of them, point at our own network.
MASS_CLOSURE_S = 1.0
# Heartbeats of different nodes come at different times: of all that are silent, some still have so much of their limit.
_NEARLY = 2 / 3


@dataclass(frozen=True, slots=True)
class _Signs:
    """When someone was last heard, and when its stream closed, if it did."""

    heard_s: float
    closed_s: float | None


def lost_at_s(record: Record, live: Live, node: Node, limits: Limits) -> float | None:
    """When this node counts as lost if nothing more is heard of it; None for one that is lost already.

    In restart mode a node's agent speaks for it. In in-process mode the workers of a member do, while they train.
    """
    if node.state is NodeState.LOST:
        return None
    agent = _agent_signs(live, node)
    if not record.in_process:
        broken_s = _broken_s(record, live, node, agent, limits)
        return _silent_s(record, live, node, agent, limits) if broken_s is None else broken_s
    agent_s = _silent_s(record, live, node, agent, limits)
    if not _is_member(record, node) or node.state is NodeState.JOINING or node.succeeded:
        return agent_s
    workers = _worker_signs(live, node)
    if record.target_reached:
        # They tidy up, and close their streams when they like. One that is silent on an open stream may hang.
        return agent_s if workers.closed_s is not None else min(agent_s, workers.heard_s + limits.hang_limit_s)
    broken_s = _broken_s(record, live, node, workers, limits)
    if broken_s is not None:
        return broken_s
    workers_s = _silent_s(record, live, node, workers, limits)
    # Its agent sees processes end, and says how. Until it does, a closed stream is a blip, or a worker that is done.
    if workers.closed_s is None:
        return workers_s
    # One that stays away for very long, where no steps show that it trains, is stopped, or hangs.
    since_s = max(workers.closed_s, live.step_advanced_s or 0.0)
    return min(max(workers_s, agent_s), since_s + limits.hang_limit_s)


def idle_lost_at_s(record: Record, live: Live, node: Node, limits: Limits) -> float:
    """When live workers that wait for their places count as hung: silent for that long, while their agent is well.

    Those that never spoke may take long to load; nobody but a person knows. Those that spoke to the controller before
    it was started again are silent from its start on.
    """
    waits = node.state in (NodeState.JOINING, NodeState.SPARE) and not node.ending
    agent = live.sessions.get(node.node_id)
    if not record.in_process or not waits or agent is None or agent.closed_s is not None:
        return math.inf
    crew = live.workers.crew(node.node_id)
    since_s = [crew.silent_since_s] if crew.workers else []
    if any(rank not in crew.ranks for rank in node.spoken):
        since_s.append(live.watched_s)
    return min(since_s, default=math.inf) + limits.hang_limit_s


def _silent_s(record: Record, live: Live, node: Node, signs: _Signs, limits: Limits) -> float:
    """While nothing is known to be broken."""
    since_s, limit_s = signs.heard_s, _silence_limit_s(limits)
    if signs.closed_s is not None:
        since_s, limit_s = signs.closed_s, limits.closed_stream_s
    due_s = since_s + limit_s
    if live.grace_until_s is not None:
        due_s = max(due_s, live.grace_until_s)
    if _vouched_by_steps(record, live, node):
        assert live.step_advanced_s is not None
        due_s = max(due_s, live.step_advanced_s + limit_s)
    return due_s


def _broken_s(record: Record, live: Live, node: Node, signs: _Signs, limits: Limits) -> float | None:
    """Training has stopped: a closed stream is then no blip, unless we lost the streams ourselves."""
    if live.failure_s is None or not _is_member(record, node):
        return None
    grace_until_s = live.grace_until_s
    if signs.closed_s is not None:
        ours = grace_until_s is not None and grace_until_s > signs.closed_s
        back_s = max(signs.closed_s + limits.return_s, live.failure_s + limits.reconnect_grace_s)
        return back_s if ours else signs.closed_s
    if not record.in_process or signs.heard_s >= live.failure_s:
        return None
    if grace_until_s is not None and grace_until_s > live.failure_s:
        return max(signs.heard_s + _silence_limit_s(limits), live.failure_s + limits.reconnect_grace_s)
    return _roll_call_until_s(live, limits)


def _silence_limit_s(limits: Limits) -> float:
    return limits.missed_heartbeats * limits.heartbeat_interval_s


def _agent_signs(live: Live, node: Node) -> _Signs:
    session = live.sessions.get(node.node_id)
    if session is None:
        return _Signs(live.watched_s, live.watched_s)
    return _Signs(session.heard_s, session.closed_s)


def _worker_signs(live: Live, node: Node) -> _Signs:
    """Of the live worker that has been silent, or away, the longest."""
    crew = live.workers.crew(node.node_id)
    if len(crew.ranks) < node.slots:
        return _Signs(live.watched_s, live.watched_s)
    return _Signs(crew.silent_since_s, crew.closed_s)


def _is_member(record: Record, node: Node) -> bool:
    return record.generation is not None and record.generation.has(node.node_id)


def _vouched_by_steps(record: Record, live: Live, node: Node) -> bool:
    """A step needs every member, so a step that advances vouches for all of them."""
    return record.phase is Phase.RUNNING and live.step_advanced_s is not None and _is_member(record, node)


def next_loss_s(state: JobState, limits: Limits) -> float | None:
    """When the first node would be judged lost."""
    record, live = state.record, state.live
    dues = [lost_at_s(record, live, node, limits) for node in record.nodes.values()]
    dues += [idle_lost_at_s(record, live, node, limits) for node in record.nodes.values()]
    return min((due for due in dues if due is not None and due < math.inf), default=None)


def judge(draft: Draft) -> list[Node]:
    """The nodes that are lost by now."""
    lost = []
    for node in draft.present():
        due_s = lost_at_s(draft.record, draft.live, node, draft.limits)
        if due_s is not None and due_s <= draft.now_s:
            lost.append(node)
    return lost


def note_closure(draft: Draft) -> None:
    """Hold judgement when most of the job's streams close together: the trouble is then probably ours."""
    nodes = {node.node_id for node in draft.present()} & draft.live.sessions.keys()
    closures = [(node_id, session.closed_s) for node_id, session in draft.live.sessions.items()]
    if draft.record.in_process:
        closures += [(worker.node_id, worker.closed_s) for worker in draft.live.workers.values()]
    recent = {
        node_id
        for node_id, closed_s in closures
        if node_id in nodes and closed_s is not None and draft.now_s - closed_s <= MASS_CLOSURE_S
    }
    if len(recent) >= 2 and len(recent) * 2 > len(nodes):
        draft.set_live(grace_until_s=draft.now_s + draft.limits.recovery_grace_s)


def note_silence(draft: Draft) -> None:
    """The same for streams that stay open: a network that swallows everything closes none.

    When the first node is due, those that fell silent with it have missed nearly as many heartbeats. Not twice for one
    silence: who is not heard of when judgement has waited is gone.
    """
    limit_s, forgiven_s = _silence_limit_s(draft.limits), draft.live.grace_until_s
    heard = [s for s in (_last_heard_s(draft.live, node) for node in draft.present()) if s is not None]
    silent = [s for s in heard if draft.now_s - s >= limit_s * _NEARLY]
    if len(silent) < 2 or len(silent) * 2 <= len(heard) or min(silent) + limit_s > draft.now_s:
        return
    if forgiven_s is None or min(silent) >= forgiven_s:
        draft.set_live(grace_until_s=draft.now_s + draft.limits.recovery_grace_s)


def is_heard(draft: Draft, node_id: str) -> bool:
    """The node's agent speaks to us, and can end its workers."""
    session = draft.session(node_id)
    # Added up as above: at the very moment when the agent counts as silent, it is not heard.
    return (
        session is not None
        and session.closed_s is None
        and session.heard_s + _silence_limit_s(draft.limits) > draft.now_s
    )


def _last_heard_s(live: Live, node: Node) -> float | None:
    """From its agent or any of its workers, on streams that are open; None if none is."""
    workers = live.workers.of(node.node_id)
    streams = (*workers, live.sessions.get(node.node_id))
    return max((each.heard_s for each in streams if each is not None and each.closed_s is None), default=None)


def forgive_stall(draft: Draft) -> None:
    """After the controller itself was held up, the time lost is nobody's silence. Before every event: what comes first
    after a stall is seldom the tick that is late.
    """
    last_s = draft.live.ticked_s
    if last_s is None or draft.now_s - last_s <= draft.limits.stall_s:
        return
    draft.set_live(ticked_s=draft.now_s)
    stall_s = draft.now_s - last_s

    def heard(time_s: float) -> float:
        return min(draft.now_s, time_s + stall_s)

    def closed(time_s: float | None) -> float | None:
        return time_s + stall_s if time_s is not None and time_s < draft.now_s - stall_s else time_s

    def later(session: Session) -> Session:
        return replace(session, heard_s=heard(session.heard_s), closed_s=closed(session.closed_s))

    def later_worker(worker: WorkerSession) -> WorkerSession:
        heard_s, paced_s = heard(worker.heard_s), heard(worker.paced_s)
        return replace(worker, heard_s=heard_s, closed_s=closed(worker.closed_s), paced_s=paced_s)

    draft.set_live(
        sessions={node_id: later(s) for node_id, s in draft.live.sessions.items()},
        workers=Roster(map(later_worker, draft.live.workers.values())),
    )


def _roll_call_until_s(live: Live, limits: Limits) -> float:
    assert live.failure_s is not None, "nobody reported a failure"
    return live.roll_call_until_s or live.failure_s + limits.roll_call_s


def note_lateness(draft: Draft) -> None:
    """Prolong a roll call to whose end we come late: who seems silent may have answered, and waits to be read."""
    live, limits, now_s = draft.live, draft.limits, draft.now_s
    if live.failure_s is None or not draft.record.in_process:
        return
    until_s, longest_s = _roll_call_until_s(live, limits), live.failure_s + _silence_limit_s(limits)
    # A tick that came in time has judged already.
    judged = live.ticked_s is not None and live.ticked_s >= until_s
    if not judged and until_s + limits.late_s < now_s < longest_s:
        draft.set_live(roll_call_until_s=min(now_s + limits.roll_call_s, longest_s))


def recovered_live(record: Record, now_s: float, limits: Limits) -> Live:
    """What is known right after a start: every stream is closed, and nobody is judged for a while."""
    sessions = {
        node.node_id: Session(session_id="", heard_s=now_s, closed_s=now_s)
        for node in record.nodes.values()
        if node.state is not NodeState.LOST
    }
    return Live(
        sessions=sessions,
        watched_s=now_s,
        waiting_until_s=now_s + limits.waiting_limit_s if record.phase is Phase.WAITING else None,
        grace_until_s=now_s + limits.recovery_grace_s,
        change_limit_s=now_s + (limits.late_limit_s if record.in_process else limits.stop_limit_s)
        if record.change
        else None,
        settle_until_s=now_s + limits.recovery_grace_s if record.phase is Phase.FORMING else None,
    )
