"""Random sequences of events, sensible and not: the invariants hold after each, and time always helps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from core.invariants import check
from stretto_controller.core import events as ev
from stretto_controller.core.actions import (
    Action,
    AskToLeave,
    Assign,
    AssignWorker,
    CutGeneration,
    Dismiss,
    FenceWorker,
    StartWorkers,
    StopWorkers,
)
from stretto_controller.core.errors import Rejected
from stretto_controller.core.job import next_wake_s, step
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, JobState, Mode, Phase, Ready, Version, WorkerReady
from stretto_controller.core.report import Checkpoint, Pace, Progress

LIMITS = Limits()
NODES = [f"n{i}" for i in range(6)]
SIZES = [(1, 4), (2, 3), (1, 1)]


class World:
    """Feeds the core and keeps just enough of the nodes' side to make many events meaningful."""

    def __init__(self, seed: int, mode: Mode = Mode.RESTART) -> None:
        self.rng = random.Random(seed)
        self.spec = JobSpec(*self.rng.choice(SIZES), mode)
        self.state: JobState | None = None
        self.now_s = 0.0
        self.sessions: dict[str, str] = {}
        self.generations: dict[str, int] = {}
        self.requests: dict[str, int] = {}
        self.workers: list[tuple[str, int]] = []
        # In-process mode: the generations that live workers were seated in.
        self.seats: dict[str, int] = {}
        self.live: list[LiveNode] = []
        self.count = 0

    def feed(self, event: ev.Event) -> None:
        try:
            decision = step("job", self.state, event, now_s=self.now_s, limits=LIMITS)
        except Rejected:
            return
        check(self.state, decision, now_s=self.now_s, limits=LIMITS)
        self.state = decision.state
        for action in decision.actions:
            if isinstance(action, Assign) and self.rng.random() < 0.95:
                self.generations[action.node_id] = action.generation.number
            if isinstance(action, AssignWorker) and self.rng.random() < 0.95:
                self.seats = {**dict(list(self.seats.items())[-8:]), action.session_id: action.generation.number}
            if isinstance(action, StopWorkers | Dismiss) and self.rng.random() < 0.7:
                self.feed(self.ready(action.node_id))
            if isinstance(action, CutGeneration | AskToLeave | FenceWorker) and self.rng.random() < 0.7:
                self.feed(ev.WorkerAsked(action.session_id, self.worker_ready(action.generation)))

    def session(self, node_id: str) -> str:
        return self.sessions.get(node_id, "none")

    def ready(self, node_id: str) -> ev.NodeReady:
        rng = self.rng
        if rng.random() < 0.9:
            self.requests[node_id] = self.requests.get(node_id, 0) + 1
        ready = Ready(
            self.requests.get(node_id, 1),
            self.generations.get(node_id, 0),
            failed=rng.random() < 0.5,
            exit_signal=rng.choice([0, 0, 9]),
            restarts_left=rng.choice([-1, -1, 0, 2]),
        )
        return ev.NodeReady(node_id, self.session(node_id), ready)

    def worker_ready(self, generation: int) -> WorkerReady:
        self.count += 1
        rng = self.rng
        version = Version(max(0, generation + rng.choice([0, 0, -1])), rng.randrange(20))
        unreachable = (rng.randrange(4),) if rng.random() < 0.2 else ()
        return WorkerReady(self.count, generation, version, rng.random() < 0.4, unreachable)

    def hello(self, node_id: str) -> ev.NodeHello:
        self.count += 1
        self.sessions[node_id] = f"s{self.count}"
        key = node_id if self.rng.random() < 0.95 else "other"
        generation = self.generations.get(node_id, 0) if self.rng.random() < 0.7 else 0
        ready = self.ready(node_id).ready if self.rng.random() < 0.3 else None
        slots = self.rng.choice([1, 1, 2])
        return ev.NodeHello(node_id, key, self.sessions[node_id], slots, "::1", self.spec, generation, ready)

    def worker(self) -> tuple[str, int]:
        return self.rng.choice(self.workers) if self.workers else ("none", 0)

    def pick(self, *events: ev.Event) -> ev.Event:
        return events[self.rng.randrange(len(events))]

    def event(self) -> ev.Event:
        rng, node_id = self.rng, self.rng.choice(NODES)
        number = self.state.record.generation.number if self.state and self.state.record.generation else 0
        number += rng.choice([0, 0, 0, 0, -1, 1])
        session_id, _ = self.worker()
        self.now_s += rng.choice([0.0, 0.0, 0.05, 0.3, 1.0, 4.0])
        if self.spec.mode is Mode.IN_PROCESS and self.seats and rng.random() < 0.5:
            return self.seated_worker_event()
        if self.spec.mode is Mode.IN_PROCESS and rng.random() < 0.4:
            return self.live_worker_event(node_id, number)
        match rng.randrange(22):
            case 0 | 1 | 2 | 3:
                return self.hello(node_id)
            case 4 | 5 | 6 | 7 | 8:
                return self.ready(node_id)
            case 9 | 10:
                return ev.NodeHeartbeat(node_id, self.session(node_id))
            case 11:
                return ev.StreamClosed(node_id, self.session(node_id))
            case 12:
                return ev.NodeSucceeded(node_id, self.session(node_id), number)
            case 13:
                return ev.NodeLeft(node_id, self.session(node_id), failed=rng.random() < 0.5)
            case 14 | 15:
                self.count += 1
                rank = rng.randrange(4)
                self.workers = [*self.workers[-8:], (f"w{self.count}", rank)]
                return ev.WorkerHello(
                    f"w{self.count}", node_id, 0, rank, number, JobSpec(base_batch_size=8, batch_size=8)
                )
            case 16:
                return ev.WorkerProgressed(session_id, Progress(number, rng.randrange(50), tau=1.0))
            case 17:
                return ev.WorkerLeft(session_id, number, 5)
            case 18:
                return self.pick(
                    ev.WorkerDraining(session_id, number),
                    ev.WorkerStreamClosed(session_id),
                    ev.CheckpointCommitted(session_id, Checkpoint(number, 5, 1.0, "c")),
                    ev.WorkerFinished(session_id, number, 50, 99.0) if rng.random() < 0.1 else ev.Tick(),
                )
            case 19:
                return self.pick(ev.ScaleRequested(rng.randrange(6)), ev.DrainRequested(node_id))
            case 20:
                return self.pick(ev.PauseRequested(), ev.ResumeRequested(), ev.ResumeRequested())
            case _:
                return ev.Recovered() if rng.random() < 0.1 and self.state is not None else ev.Tick()

    def live_worker_event(self, node_id: str, number: int) -> ev.Event:
        """What only workers of in-process mode say."""
        rng, (session_id, _) = self.rng, self.worker()
        if rng.random() < 0.5:
            self.count += 1
            self.workers = [*self.workers[-8:], (f"w{self.count}", 0)]
            ready = self.worker_ready(number) if rng.random() < 0.7 else None
            return ev.WorkerHello(f"w{self.count}", node_id, rng.choice([0, 0, 1]), -1, 0, JobSpec(), ready)
        return self.pick(
            ev.WorkerAlive(session_id, self.pace(number)), ev.WorkerAsked(session_id, self.worker_ready(number))
        )

    def seated_worker_event(self) -> ev.Event:
        """A live worker goes on as it should, mostly."""
        rng = self.rng
        session_id = rng.choice(list(self.seats))
        number = self.seats[session_id]
        if rng.random() < 0.05:
            return self.pick(
                ev.WorkerAsked(session_id, self.worker_ready(number)),
                ev.WorkerDraining(session_id, number),
                ev.WorkerStreamClosed(session_id),
            )
        return self.pick(
            ev.WorkerAlive(session_id, self.pace(number)),
            ev.WorkerAlive(session_id, self.pace(number)),
            ev.WorkerProgressed(session_id, Progress(number, rng.randrange(6), tau=1.0)),
        )

    def pace(self, generation: int) -> Pace:
        rng = self.rng
        waiting_s = rng.choice([0.0, 0.2, 2.0, 400.0])
        working_s = 0.0 if waiting_s else rng.choice([0.0, 0.2, 400.0])
        return Pace(generation, rng.choice([1, 5, 5, 40]), working_s, waiting_s, rng.choice([0.0, 0.1, 60.0]))

    def recover(self) -> None:
        if self.state is not None:
            self.state = JobState(self.state.record)
            self.feed(ev.Recovered())


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("block", range(10))
def test_invariants_hold_over_random_events(block: int, mode: Mode) -> None:
    for seed in range(block * 100, block * 100 + 100):
        world = World(seed, mode)
        try:
            for _ in range(150):
                event = world.event()
                if isinstance(event, ev.Recovered):
                    world.recover()
                else:
                    world.feed(event)
        except AssertionError as broken:
            raise AssertionError(f"seed {seed}: {broken}") from broken


@pytest.mark.parametrize("mode", Mode)
def test_a_second_look_at_the_same_moment_changes_nothing_durable(mode: Mode) -> None:
    for seed in range(100):
        world = World(seed, mode)
        for _ in range(80):
            event = world.event()
            if isinstance(event, ev.Recovered) or world.state is None:
                world.feed(world.hello("n0"))
                continue
            world.feed(event)
            world.feed(ev.Tick())
            record = world.state.record
            world.feed(ev.Tick())
            assert world.state.record is record, f"seed {seed}: a repeated tick after {event} changed the record"


@pytest.mark.parametrize("mode", Mode)
def test_the_next_wake_is_always_ahead_once_time_was_told(mode: Mode) -> None:
    """Otherwise the runner would spin."""
    for seed in range(200):
        world = World(seed, mode)
        for _ in range(80):
            event = world.event()
            world.recover() if isinstance(event, ev.Recovered) else world.feed(event)
            if world.state is None:
                continue
            world.feed(ev.Tick())
            wake_s = next_wake_s(world.state, LIMITS)
            assert wake_s is None or wake_s > world.now_s, f"seed {seed}: wakes at {wake_s}, it is {world.now_s}"


def test_well_behaved_nodes_always_come_to_run() -> None:
    """After any history, nodes that answer as they should get a generation: no state is a dead end."""
    for seed in range(200):
        world = World(seed)
        for _ in range(100):
            event = world.event()
            world.recover() if isinstance(event, ev.Recovered) else world.feed(event)
        if world.state is not None and not world.state.record.phase.finished:
            world.feed(ev.ResumeRequested())
        world.rng = random.Random(seed)
        fresh = [f"fresh{i}" for i in range(4)]
        for node_id in fresh:
            world.sessions[node_id] = f"session-{node_id}"
            hello = ev.NodeHello(node_id, node_id, world.sessions[node_id], 1, "::1", world.spec, 0, Ready(1))
            world.feed(hello)
        for _ in range(400):
            world.now_s += 0.5
            for node_id in fresh:
                world.feed(ev.NodeHeartbeat(node_id, world.sessions[node_id]))
                number = world.generations.get(node_id, 0)
                assert world.state is not None
                node = world.state.record.nodes.get(node_id)
                generation = world.state.record.generation
                stopped = world.state.record.phase is Phase.RECONFIGURING and number and generation
                if stopped and node is not None and node.ready is None:
                    ready = Ready(node.answered_request + 1, number)
                    world.feed(ev.NodeReady(node_id, world.sessions[node_id], ready))
            world.feed(ev.Tick())
        assert world.state is not None
        record = world.state.record
        # The history may have left a member that ended well; then the job may end well, too.
        assert record.phase in (Phase.RUNNING, Phase.SUCCEEDED), f"seed {seed}: {record.phase} ({record.reason})"


class LiveNode:
    """An agent and its one live worker that do as they are told, at once."""

    def __init__(self, world: World, node_id: str) -> None:
        self.world, self.node_id = world, node_id
        self.requests = 0
        self.generation = 0
        self.step = 0
        self.stream = ""

    def joins(self) -> None:
        self.world.count += 1
        self.world.sessions[self.node_id] = f"agent {self.node_id} {self.world.count}"
        spec, session_id = self.world.spec, self.world.sessions[self.node_id]
        self.feed(ev.NodeHello(self.node_id, self.node_id, session_id, 1, "::1", spec, 0, Ready(1)))

    def feed(self, event: ev.Event) -> None:
        """Feed one event, and let whoever it concerns answer."""
        world = self.world
        decision = step("job", world.state, event, now_s=world.now_s, limits=LIMITS)
        check(world.state, decision, now_s=world.now_s, limits=LIMITS)
        world.state = decision.state
        for action in decision.actions:
            for node in world.live:
                node.hears(action)

    def hears(self, action: Action) -> None:
        match action:
            case StartWorkers(node_id=self.node_id):
                self.world.count += 1
                self.stream = f"worker {self.node_id} {self.world.count}"
                self.feed(ev.WorkerHello(self.stream, self.node_id, 0, -1, 0, JobSpec(), self.asks()))
            case AssignWorker(session_id=self.stream) if action.request_id == self.requests:
                self.generation, self.step = action.generation.number, 0
            case AskToLeave(session_id=self.stream) | CutGeneration(session_id=self.stream):
                if action.generation == self.generation:
                    self.feed(ev.WorkerAsked(self.stream, self.asks()))

    def asks(self) -> WorkerReady:
        self.requests += 1
        left, self.generation = self.generation, 0
        return WorkerReady(self.requests, left, Version(left, self.step))

    def lives(self) -> None:
        self.feed(ev.NodeHeartbeat(self.node_id, self.world.sessions[self.node_id]))
        self.feed(ev.WorkerAlive(self.stream))
        if self.generation:
            self.step += 1
            self.feed(ev.WorkerProgressed(self.stream, Progress(self.generation, self.step)))


def test_well_behaved_live_workers_always_come_to_run() -> None:
    """After any history of in-process mode, too; those whom the history left behind do not hold them up for ever."""
    for seed in range(100):
        world = World(seed, Mode.IN_PROCESS)
        for _ in range(100):
            event = world.event()
            world.recover() if isinstance(event, ev.Recovered) else world.feed(event)
        if world.state is not None and not world.state.record.phase.finished:
            world.feed(ev.ResumeRequested())
        world.live = [LiveNode(world, f"fresh{i}") for i in range(4)]
        for node in world.live:
            node.joins()
        for _ in range(150):
            world.now_s += 0.5
            for node in world.live:
                node.lives()
            world.live[0].feed(ev.Tick())
        assert world.state is not None
        record = world.state.record
        assert record.phase in (Phase.RUNNING, Phase.SUCCEEDED), f"seed {seed}: {record.phase} ({record.reason})"
        running = [node for node in world.live if node.generation]
        assert running or record.target_reached, f"seed {seed}: none of them takes part"


def test_an_old_generation_makes_no_progress() -> None:
    spec = JobSpec(1, 1, Mode.RESTART)
    state: JobState | None = None
    for event in (
        ev.NodeHello("n0", "k", "s", 1, "::1", spec, ready=Ready(1)),
        ev.WorkerHello("w1", "n0", 0, 0, 1, JobSpec()),
        ev.NodeReady("n0", "s", Ready(2, 1)),
        ev.WorkerHello("w2", "n0", 0, 0, 2, JobSpec()),
        ev.WorkerProgressed("w2", Progress(2, 3, tau=3.0)),
    ):
        state = step("job", state, event, now_s=0.0, limits=LIMITS).state
    assert state is not None
    assert state.live.progress is not None
    for late in (
        ev.WorkerProgressed("w1", Progress(1, 99, tau=99.0)),
        ev.WorkerProgressed("w2", Progress(1, 99, tau=99.0)),
        ev.WorkerProgressed("w2", Progress(2, 2, tau=2.0)),
        ev.CheckpointCommitted("w1", Checkpoint(1, 99, 99.0, "late")),
        ev.WorkerFinished("w1", 1, 99, 99.0),
    ):
        after = step("job", state, late, now_s=1.0, limits=LIMITS).state
        assert after.live.progress == state.live.progress
        assert after.record == state.record


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (JobSpec(0, 2, Mode.RESTART), "min_nodes is 0"),
        (JobSpec(3, 2, Mode.RESTART), "min_nodes is 3 and max_nodes is 2"),
        (JobSpec(1, 2, Mode.RESTART, target_tau=float("nan")), "target_tau is nan"),
        (JobSpec(1, 2, Mode.RESTART, batch_size=4), "without base_batch_size"),
    ],
)
def test_impossible_specs_are_refused_by_name(spec: JobSpec, complaint: str) -> None:
    with pytest.raises(Rejected, match=complaint):
        step("job", None, ev.JobCreated(spec), now_s=0.0, limits=LIMITS)


def test_scale_follows_the_workers_or_is_fixed() -> None:
    assert JobSpec(1, 9, Mode.RESTART, 16, 16).scale(4) == 4.0
    assert JobSpec(1, 9, Mode.RESTART, 16, 24).scale(3) == 4.5
    assert JobSpec(1, 9, Mode.RESTART, 16, 0, 8).scale(3) == 0.5
    assert JobSpec(1, 9, Mode.RESTART).scale(3) == 0.0


def test_limits_must_be_positive() -> None:
    LIMITS.validate()
    with pytest.raises(ValueError, match="settle_s is 0"):
        replace(LIMITS, settle_s=0.0).validate()
