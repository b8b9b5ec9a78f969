"""The controller: the real core and the real wire code under a runner that saves before it sends, and can be killed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulation.links import Connection
from stretto_controller.core import actions as ac
from stretto_controller.core import events as ev
from stretto_controller.core import job as core
from stretto_controller.core.errors import Refusal, Rejected
from stretto_controller.core.model import JobState, Record
from stretto_controller.history import History
from stretto_controller.store.contents import GenerationSummary
from stretto_controller.wire import inbound, outbound
from stretto_proto.v1 import rendezvous_pb2 as rendezvous

if TYPE_CHECKING:
    from simulation.world import World

JOB = "job"
_ROWS = 10_000
# As the runner: these never bring the next wake-up forward.
_FREQUENT = (ev.NodeHeartbeat, ev.WorkerAlive, ev.WorkerProgressed)
_NODE_ACTIONS = (ac.StartWorkers, ac.StopWorkers, ac.Dismiss, ac.FinishGeneration)
_WORKER_ACTIONS = (
    ac.WelcomeWorker,
    ac.AskToLeave,
    ac.AskToSave,
    ac.AssignWorker,
    ac.CutGeneration,
    ac.SaveAndExit,
    ac.FenceWorker,
)
# A client tries again after these; the others end its stream for good.
_RETRIED = (Refusal.NOT_YET, Refusal.EXHAUSTED)


@dataclass(slots=True)
class _Release:
    """A decision on its way out. record: to be saved first, if the decision changed it."""

    actions: tuple[ac.Action, ...]
    greeted: Connection | None
    record: Record | None
    # It may go out.
    saved: bool
    # The record is on the disk.
    stored: bool = False
    # Of the job's history, those that the decision changed.
    rows: tuple[GenerationSummary, ...] = ()


@dataclass(slots=True)
class _NodePeer:
    node_id: str

    def event(self, message: Any, session_id: str) -> ev.Event:
        return inbound.node_event(message, self.node_id, session_id)

    def closed(self, session_id: str) -> ev.Event:
        return ev.StreamClosed(self.node_id, session_id)


class _WorkerPeer:
    def event(self, message: Any, session_id: str) -> ev.Event:
        return inbound.worker_event(message, session_id)

    def closed(self, session_id: str) -> ev.Event:
        return ev.WorkerStreamClosed(session_id)


class Controller:
    """One controller process after another, on one disk."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        # What the mutation of it takes away.
        self.saves_first = True
        # Counts processes: what was under way in an earlier one is void.
        self.life = 1
        self.started_s = 0.0
        self.state: JobState | None = None
        self.connections: list[Connection] = []
        self._disk: Record | None = None
        self._history = History(1, limit=_ROWS)
        # By the generation's number; of all incarnations.
        self.rows: dict[int, GenerationSummary] = {}
        # A worker's word that the target is reached is on the disk: of the job's which incarnation.
        self.told_end_of = 0
        self._releases: deque[_Release] = deque()
        self._sessions: dict[str, Connection] = {}
        self._by_node: dict[str, Connection] = {}
        self._wake = 0
        self._wake_s = 0.0
        self._ticked_s = 0.0

    # -- its life

    def crash(self, *, lose_disk: bool) -> None:
        """kill -9. Of the saves under way, the first few may have come to the disk."""
        if not self.up:
            return
        rng = self.world.rng
        self.world.say("controller", "is killed%s", ", and its disk is lost" if lose_disk else "")
        for release in self._releases:
            if rng.random() < 0.5:
                break
            self._store(release)
        if lose_disk:
            self._disk, self.rows, self.told_end_of = None, {}, 0
            self.world.invariants.controller_forgot_everything()
        self.up, self.state = False, None
        self._history = History(0, limit=_ROWS)
        self.life += 1
        self._releases.clear()
        self._sessions.clear()
        self._by_node.clear()
        for connection in self.connections:
            connection.break_(client_delay_s=self.world.delay_s(), controller_delay_s=0.0)
        self.connections.clear()

    def start(self) -> None:
        """A new process reads what the disk holds."""
        if self.up:
            return
        self.up = True
        self.started_s = self.world.scheduler.now_s
        self._ticked_s = self.world.scheduler.now_s
        self.world.say("controller", "starts")
        if self._disk is not None:
            self.state = JobState(self._disk)
            self._history = History(self._disk.incarnation, self.rows.values(), limit=_ROWS)
            self.world.invariants.controller_recovered(self.state)
            self.submit(ev.Recovered())

    def open_connections(self) -> list[Connection]:
        """Those that at least the client believes in."""
        self.connections = [connection for connection in self.connections if not connection.broken]
        return list(self.connections)

    # -- what comes in

    def receive(self, connection: Connection, message: Any) -> None:
        """A message has arrived."""
        try:
            if connection.accepted:
                self.submit(connection.peer.event(message, connection.session_id))
            else:
                self._greet(connection, message)
        except Rejected as refusal:
            self.world.say("controller", "refuses %s: %s", connection.session_id, refusal.message)
            connection.end(None if refusal.kind in _RETRIED else refusal.message)

    def _greet(self, connection: Connection, message: Any) -> None:
        event: ev.NodeHello | ev.WorkerHello
        if isinstance(message, rendezvous.AttendRequest):
            _, event = inbound.node_hello(message, connection.session_id)
            connection.peer = _NodePeer(event.node_id)
            self._sessions[connection.session_id] = connection
            # Bound before the actions that the hello causes are sent.
            previous = self._by_node.get(event.node_id)
            self._by_node[event.node_id] = connection
            try:
                self.submit(event, greeted=connection)
            except Rejected:
                if previous is not None:
                    self._by_node[event.node_id] = previous
                raise
        else:
            _, event = inbound.worker_hello(message, connection.session_id)
            connection.peer = _WorkerPeer()
            self._sessions[connection.session_id] = connection
            self.submit(event)
        connection.accepted = True

    def noticed(self, connection: Connection) -> None:
        """The controller sees that a connection has ended."""
        if connection.life != self.life or not self.up:
            return
        self._sessions.pop(connection.session_id, None)
        if not connection.accepted:
            return
        connection.accepted = False
        for node_id in [n for n, bound in self._by_node.items() if bound is connection]:
            del self._by_node[node_id]
        try:
            self.submit(connection.peer.closed(connection.session_id))
        except Rejected as refusal:
            self.world.say("controller", "could not note a closed stream: %s", refusal.message)

    def request(self, event: ev.Event) -> bool:
        """What a person asks for. False if it could not be done now."""
        if not self.up or self.state is None:
            return False
        try:
            self.submit(event)
        except Rejected as refusal:
            self.world.say("controller", "refuses: %s", refusal.message)
            return False
        return True

    # -- deciding

    def submit(self, event: ev.Event, greeted: Connection | None = None) -> None:
        """Decide on one event now; its actions follow when it is saved. Raises Rejected."""
        world, before = self.world, self.state
        now_s = world.scheduler.now_s
        decision = core.step(JOB, before, event, now_s=now_s, limits=world.setup.limits)
        self.state = decision.state
        if world.tracing:
            _tell(world, event, before, decision)
        world.invariants.decided(before, event, decision)
        if any(isinstance(action, ac.BeginGeneration) for action in decision.actions):
            world.faults.moment("begun", None)
        record = decision.state.record
        changed = before is None or record is not before.record
        if decision.actions or changed or greeted is not None:
            saved = not changed or not self.saves_first
            rows = tuple(self._rows(decision))
            self._releases.append(_Release(decision.actions, greeted, record if changed else None, saved, rows=rows))
            if changed:
                world.scheduler.after(world.save_s(), self._saved, self.life, self._releases[-1])
            self._let_go()
        if not isinstance(event, _FREQUENT):
            self._plan_wake_up(now_s)

    def _saved(self, life: int, release: _Release) -> None:
        """A save is on the disk, and with it all earlier ones."""
        if life != self.life or release.stored:
            return
        for earlier in self._releases:
            self._store(earlier)
            earlier.saved = earlier.stored = True
            if earlier is release:
                break
        self._store(release)
        release.saved = release.stored = True
        self._let_go()

    def _store(self, release: _Release) -> None:
        if not release.stored:
            self._disk = release.record or self._disk
            ends = any(_tells_of_the_end(action) for action in release.actions)
            self.told_end_of = self._disk.incarnation if ends and self._disk else self.told_end_of
            self.rows |= {row.generation.number: row for row in release.rows}

    def _rows(self, decision: ac.Decision) -> Iterator[GenerationSummary]:
        """As the real controller's ledger keeps them."""
        if self._history.incarnation != decision.state.record.incarnation:
            self._history = History(decision.state.record.incarnation, limit=_ROWS)
        for action in decision.actions:
            if isinstance(action, ac.BeginGeneration):
                yield from self._history.begin(action, 0.0)
            elif isinstance(action, ac.FirstStep):
                yield from self._history.first_step(action)
            elif isinstance(action, ac.ReachTarget):
                yield from self._history.target_reached(action)
            elif isinstance(action, ac.EndGeneration):
                yield from self._history.end(action, 1.0)

    def _let_go(self) -> None:
        releases = self._releases
        while releases and releases[0].saved:
            release = releases.popleft()
            if release.record is None:
                self._store(release)
            if release.greeted is not None:
                interval_s = self.world.setup.limits.heartbeat_interval_s
                release.greeted.to_client(outbound.node_welcome("controller", interval_s))
            for action in release.actions:
                self._send(action)

    def _send(self, action: ac.Action) -> None:
        """To its stream. A missing stream is no error: the peer comes back and is answered then."""
        if isinstance(action, _NODE_ACTIONS):
            connection = self._by_node.get(action.node_id)
            if connection is not None:
                connection.to_client(outbound.to_node(action))
        elif isinstance(action, _WORKER_ACTIONS):
            connection = self._sessions.get(action.session_id)
            if connection is not None:
                interval_s = self.world.setup.limits.heartbeat_interval_s
                connection.to_client(outbound.to_worker(action, "controller", interval_s))
        elif isinstance(action, ac.CloseSession):
            connection = self._sessions.get(action.session_id)
            if connection is not None:
                connection.end(None)

    def _plan_wake_up(self, now_s: float) -> None:
        state = self.state
        if state is None or state.record.phase.finished:
            return
        wake_s = core.next_wake_s(state, self.world.setup.limits)
        latest_s = self._ticked_s + self.world.setup.tick_interval_s
        wake_s = latest_s if wake_s is None else min(wake_s, latest_s)
        wake_s = max(wake_s, now_s + 0.005)
        self._wake += 1
        self.world.scheduler.after(wake_s - now_s, self._tick, self.life, self._wake)

    def _tick(self, life: int, wake: int) -> None:
        if life == self.life and wake == self._wake and self.up:
            self._ticked_s = self.world.scheduler.now_s
            self.submit(ev.Tick())


def _tells_of_the_end(action: ac.Action) -> bool:
    return isinstance(action, ac.ReachTarget) or (isinstance(action, ac.LogEvent) and action.kind == "target_reached")


def _tell(world: World, event: ev.Event, before: JobState | None, decision: ac.Decision) -> None:
    """For the trace."""
    phase = decision.state.record.phase
    changed = before is None or before.record.phase is not phase
    if isinstance(event, (*_FREQUENT, ev.Tick)) and not decision.actions and not changed:
        return
    world.say("controller", "hears %s", event)
    for action in decision.actions:
        world.say("controller", "  -> %s", action)
    if changed:
        world.say("controller", "  = %s: %s", phase, decision.state.record.reason)
