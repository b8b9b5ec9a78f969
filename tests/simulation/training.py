"""The training thread: `ElasticTrainer` on `LiveSession`, with arithmetic on histories in place of tensors.

Every function here is a part of one thread. It yields while it waits: for so many seconds at most, or (None) until
something changes; then it looks again. Collectives yield the contributions of all ranks.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulation.groups import Membership
from simulation.histories import State
from simulation.storage import Fenced, Saved
from stretto.progress_report import StepFigures
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

if TYPE_CHECKING:
    from simulation.worker import Worker

Thread = Generator[float | None, None, None]
FORMATION_LIMIT_S = 10.0
FLUSH_LIMIT_S = 1.0
# Only who has reached the target ends with 0: agents take that for the job's end.
TERMINATED = 143
BATCH = 8


class Superseded(Exception):
    """A newer generation exists."""


class Broken(Exception):
    """The generation was not formed, or broke."""

    def __init__(self, unreachable: tuple[int, ...] = ()) -> None:
        super().__init__(unreachable)
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank contributes to a step's collective, beside its gradient."""

    state: State
    cursor: int
    leave: bool
    save: bool


def run(worker: Worker) -> Thread:
    """From the process's start to its end."""
    yield from _sleep(worker, worker.world.start_up_s())
    worker.ask(failed=False)
    worker.begin_to_beat()
    try:
        while True:
            place = yield from _place(worker)
            if place is None:
                return
            try:
                yield from _build(worker, place)
            except Superseded:
                _leave(worker, failed=True)
                continue
            except Broken as broken:
                _leave(worker, failed=True, unreachable=broken.unreachable)
                continue
            try:
                finished = yield from _generation(worker, place)
            except Broken as broken:
                _leave(worker, failed=True, unreachable=broken.unreachable)
                continue
            if finished:
                yield from _farewell(worker)
                return
            _leave(worker, failed=False)
    except Fenced as fenced:
        worker.world.say(worker.name, "fails: %s", fenced)
        worker.exit(1)


def _leave(worker: Worker, *, failed: bool, unreachable: tuple[int, ...] = ()) -> None:
    """First the report, since others wait for it; then the connections end."""
    worker.works_since_s = None
    worker.ask(failed=failed, unreachable=unreachable)
    if worker.group is not None:
        worker.group.abandon()
        worker.group = None
    worker.standing = -abs(worker.standing)
    worker.world.standing_changed()


def _farewell(worker: Worker) -> Thread:
    """The target is reached: what was said last has its time to reach the controller."""
    assert worker.group is not None
    worker.group.abandon()
    until_s = worker.world.scheduler.now_s + FLUSH_LIMIT_S
    while not worker.stream.connected and worker.world.scheduler.now_s < until_s - 1e-9:
        yield until_s - worker.world.scheduler.now_s
    worker.exit(0)


def _sleep(worker: Worker, seconds: float) -> Thread:
    until_s = worker.world.scheduler.now_s + seconds
    while (left_s := until_s - worker.world.scheduler.now_s) > 1e-9:
        yield left_s


def _held_up(worker: Worker) -> Thread:
    """Where the user's code or the storage is called, the thread may hang."""
    while (left_s := worker.busy_until_s - worker.world.scheduler.now_s) > 1e-9:
        yield left_s


def _place(worker: Worker) -> Generator[float | None, None, pb.WorkerAssignment | None]:
    """LiveSession._wait_for_place: wait for an answer; None when this process ends instead."""
    state = worker.state
    while (assignment := state.assignment) is None:
        if worker.failure is not None:
            worker.exit(1)
            return None
        if state.give_up_reason is not None:
            yield from _save_at_last(worker)
            worker.exit(1)
            return None
        wait_s = None
        if worker.terminated:
            if not state.keeps_state:
                wait_s = worker.left_s + 2.0 - worker.world.scheduler.now_s
                if state.request is not None and state.request.failed:
                    wait_s = 0.0
            if worker.lost_after_ask or (wait_s is not None and wait_s <= 0):
                worker.world.invariants.goes(worker)
                worker.exit(TERMINATED)
                return None
        yield wait_s
    return assignment


def _build(worker: Worker, place: pb.WorkerAssignment) -> Thread:
    """GroupLife.build: meet every other member in this generation, then connect with all."""
    world, number = worker.world, place.generation
    ports = tuple(each.preflight_port for each in place.places)
    worker.standing = number
    world.standing_changed()
    world.faults.moment("build", worker)
    deadline_s = world.scheduler.now_s + FORMATION_LIMIT_S
    seen: dict[int, int] = {}
    world.building[worker] = None
    try:
        while True:
            _judge(worker, number, ports, seen)
            if all(seen.get(rank) == number for rank in range(len(ports)) if rank != place.rank):
                break
            if world.scheduler.now_s >= deadline_s - 1e-9:
                late = {rank for rank in range(len(ports)) if seen.get(rank) != number} - {place.rank}
                silent = {rank for rank in range(len(ports)) if rank != place.rank and _silent(worker, ports[rank])}
                raise Broken(tuple(sorted(late | silent)))
            yield deadline_s - world.scheduler.now_s
    finally:
        world.building.pop(worker, None)
    formation = world.formation(number, ports)
    worker.group = Membership(formation, place.rank, worker)
    yield from _collective(worker, "init", None, deadline_s=deadline_s)


def _judge(worker: Worker, number: int, ports: tuple[int, ...], seen: dict[int, int]) -> None:
    """Attempt.judge: raise if this generation cannot be formed any more."""
    if worker.state.over(number) is not None or worker.failure is not None:
        raise Superseded
    gone = []
    for rank, port in enumerate(ports):
        peer = worker.world.by_port[port]
        if peer is worker or not worker.world.network.linked(worker.node_id, peer.node_id):
            continue
        if not peer.alive:
            gone.append(rank)
        elif not peer.frozen:
            seen[rank] = peer.standing
    if any(abs(seen_number) > number for seen_number in seen.values()):
        raise Superseded
    if gone:
        raise Broken(tuple(gone))
    if any(seen_number == -number for seen_number in seen.values()):
        raise Broken


def _silent(worker: Worker, port: int) -> bool:
    peer = worker.world.by_port[port]
    return not peer.runs or not worker.world.network.linked(worker.node_id, peer.node_id)


def _collective(
    worker: Worker,
    kind: str,
    content: Any,
    *,
    source: int = -1,
    duration_s: float = 0.0,
    deadline_s: float | None = None,
) -> Generator[float | None, None, dict[int, Any]]:
    """One operation of all ranks; what each contributed. Raises Broken."""
    group, scheduler = worker.group, worker.world.scheduler
    assert group is not None, "a collective needs a group"
    if group.broken:
        raise Broken(tuple(sorted(group.gone)))
    collective = group.formation.contribute(group, kind, content, source=source, duration_s=duration_s)
    group.waiting_since_s = scheduler.now_s
    worker.world.faults.moment(kind, worker)
    while group.rank not in collective.done:
        if group.broken:
            raise Broken(tuple(sorted(group.gone)))
        if deadline_s is not None and scheduler.now_s >= deadline_s - 1e-9:
            raise Broken(tuple(rank for rank in range(len(group.formation.places)) if not worker.reaches(group, rank)))
        yield None if deadline_s is None else deadline_s - scheduler.now_s
    group.waiting_since_s = None
    return collective.contributions


def _generation(worker: Worker, place: pb.WorkerAssignment) -> Generator[float | None, None, bool]:
    """Take the generation's state, and train until all agree to leave (False) or the target is reached (True)."""
    yield from _synchronise(worker, place)
    world, state = worker.world, worker.state
    checks = yield from _collective(worker, "check", worker.holding)
    world.invariants.checked(worker, checks)
    while worker.holding.step < world.setup.target_step:
        step = yield from _step(worker)
        leaving, saving = any(s.leave for s in step.values()), any(s.save for s in step.values())
        if saving:
            yield from _collective(worker, "commit", worker.holding)
            worker.committed()
            yield from _save(worker, place)
        if leaving and worker.holding.step < world.setup.target_step:
            return False
    yield from _collective(worker, "commit", worker.holding)
    worker.committed()
    yield from _save(worker, place)
    worker.stream.send(state.finish(float(worker.holding.step)))
    world.invariants.finished(worker)
    return True


def _synchronise(worker: Worker, place: pb.WorkerAssignment) -> Thread:
    """Generation.synchronise: everyone takes the source's state, or keeps its own if the transfer breaks."""
    step = worker.state.version.step
    if not place.in_step:
        source = max(place.source_rank, 0)
        if place.source_rank < 0 and place.rank == 0:
            step = yield from _restore(worker, place)
        if len(place.places) > 1:
            sent = (worker.holding, worker.cursor)
            duration_s = worker.world.transfer_s()
            received = yield from _collective(worker, "transfer", sent, source=source, duration_s=duration_s)
            yield from _collective(worker, "agree", received[source][0])
            worker.holding, worker.cursor = received[source]
            step = worker.holding.step
    worker.synchronised(step)


def _restore(worker: Worker, place: pb.WorkerAssignment) -> Generator[float | None, None, int]:
    """Rank 0, where nobody's state may be gone on from: fence the folder, then load the newest checkpoint."""
    _raise_fence(worker, place.generation)
    yield from _sleep(worker, worker.world.storage_s())
    yield from _held_up(worker)
    newest = worker.world.storage.newest()
    worker.holding, worker.cursor = (newest.state, newest.cursor) if newest else (worker.world.fresh, 0)
    worker.world.invariants.restored(worker, place.generation, newest)
    return worker.holding.step


def _step(worker: Worker) -> Generator[float | None, None, dict[int, Step]]:
    """One step: compute, let all ranks reduce and agree, move."""
    world, state, group = worker.world, worker.state, worker.group
    assert group is not None, "steps are taken in a generation"
    worker.works_since_s = world.scheduler.now_s
    yield from _sleep(worker, world.compute_s())
    yield from _held_up(worker)
    worker.works_since_s = None
    leave = state.leave
    due = group.rank == 0 and world.rng.random() < world.setup.save_rate
    wishes = Step(
        worker.holding,
        worker.cursor,
        leave=leave is not None or state.draining,
        save=due or (leave is not None and leave.save),
    )
    step: dict[int, Step] = yield from _collective(worker, "step", wishes)
    end = worker.cursor + BATCH * len(group.formation.places)
    worker.holding = worker.holding.after(state.generation, worker.cursor, end)
    worker.cursor = end
    worker.stepped(figures(worker.holding.step))
    world.faults.moment("moved", worker)
    return step


def _save(worker: Worker, place: pb.WorkerAssignment) -> Thread:
    """Rank 0 writes a checkpoint of the latest step; the others do not wait for it."""
    if place.rank == 0:
        yield from _write(worker, place.generation)


def _write(worker: Worker, generation: int) -> Thread:
    world = worker.world
    _raise_fence(worker, generation)
    state, cursor = worker.holding, worker.cursor
    world.faults.moment("save", worker)
    yield from _sleep(worker, world.storage_s())
    yield from _held_up(worker)
    saved = Saved(generation, state.step, state, cursor)
    world.storage.commit(saved)
    world.say(worker.name, "saves %s", state)
    world.invariants.saved(worker, saved)
    told = types_pb2.CheckpointCommitted(
        generation=generation, step=state.step, tau=float(state.step), path=f"checkpoint-{generation}-{state.step}"
    )
    worker.stream.send(worker.state.checkpoint(told))


def _save_at_last(worker: Worker) -> Thread:
    """The job gives up, and nobody else saves this state."""
    worker.world.invariants.gives_up(worker)
    yield from _write(worker, worker.state.version.generation)


def _raise_fence(worker: Worker, generation: int) -> None:
    if worker.fenced_storage < generation:
        worker.world.storage.raise_fence(generation)
        worker.fenced_storage = generation


def torn(state: State) -> State:
    """The state of a worker that was overwritten in part."""
    return State(state.parent, state.generation, state.start, state.end, torn=True)


def figures(step: int) -> StepFigures:
    """Of a step, as it is reported."""
    return StepFigures(step, float(step), step - 1.0, 1.0, 1.0, 0.0, (0.1,), (0.1,), 0.0, 0.0, step * BATCH, 0, 0.1)
