"""Deliberate faults in the system, each of which the invariants must find: they show that the simulation can see.

A mutation replaces one function of the core, of the worker's state, or of the simulated shell around them. `seeds` is
how many schedules it may take until an invariant breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from simulation import training
from simulation.agent import Agent
from simulation.simulated_controller import Controller
from simulation.storage import Storage
from simulation.worker import Worker
from stretto.live.state import LiveState, Version
from stretto_controller.core import events as ev
from stretto_controller.core import job, liveness, partition, readiness, rendezvous, workers
from stretto_controller.core.draft import Draft
from stretto_controller.core.model import Generation, WorkerSession
from stretto_controller.core.model import Version as CoreVersion
from stretto_controller.history import History
from stretto_controller.store.contents import GenerationSummary
from stretto_proto.v1 import training_pb2 as pb


@dataclass(frozen=True, slots=True)
class Mutation:
    """target, name: what is replaced (an attribute, an entry), by what `make` returns when given the original."""

    what: str
    target: Any
    name: Any
    make: Callable[[Any], Any]
    seeds: int = 800


@contextmanager
def broken(mutation: Mutation | None) -> Iterator[None]:
    """The system has this fault inside the block; None: it has none of them."""
    with ExitStack() as stack:
        if mutation is not None:
            target, key = mutation.target, mutation.name
            if isinstance(target, dict):
                stack.enter_context(patch.dict(target, {key: mutation.make(target[key])}))
            else:
                stack.enter_context(patch.object(target, key, mutation.make(getattr(target, key))))
        yield


# -- the controller


def _versions(asking: Sequence[WorkerSession]) -> list[CoreVersion]:
    return [worker.ready.version for worker in asking if worker.ready is not None]


def _by_step_only(_: Any) -> Any:
    def choose_source(draft: Draft, asking: Sequence[WorkerSession]) -> tuple[int, bool]:
        steps = [version.step for version in _versions(asking)]
        if not max(steps, default=0):
            return -1, False
        return steps.index(max(steps)), len(set(steps)) == 1

    return choose_source


def _without_lineage(_: Any) -> Any:
    def choose_source(draft: Draft, asking: Sequence[WorkerSession]) -> tuple[int, bool]:
        versions = _versions(asking)
        newest = max(versions, default=CoreVersion())
        if newest == CoreVersion():
            return -1, False
        return versions.index(newest), all(version == newest for version in versions)

    return choose_source


def _always_in_step(original: Any) -> Any:
    def choose_source(draft: Draft, asking: Sequence[WorkerSession]) -> tuple[int, bool]:
        source_rank, _ = original(draft, asking)
        return source_rank, source_rank >= 0

    return choose_source


def _oldest_source(original: Any) -> Any:
    def choose_source(draft: Draft, asking: Sequence[WorkerSession]) -> tuple[int, bool]:
        source_rank, in_step = original(draft, asking)
        versions = _versions(asking)
        return (source_rank, in_step) if source_rank < 0 else (versions.index(min(versions)), in_step)

    return choose_source


def _ranks_twice(original: Any) -> Any:
    def seat(draft: Draft, worker: WorkerSession, request_id: int, generation: Generation, rank: int) -> None:
        original(draft, worker, request_id, generation, max(0, rank - 1))

    return seat


def _remember_complaints(original: Any) -> Any:
    def forget_workers(draft: Draft, node_id: str) -> None:
        apart = draft.live.apart
        original(draft, node_id)
        draft.set_live(apart=apart)

    return forget_workers


def _closure_is_death(original: Any) -> Any:
    def lost_at_s(record: Any, live: Any, node: Any, limits: Any) -> Any:
        own = [worker.closed_s for worker in live.workers.values() if worker.node_id == node.node_id]
        closed = [closed_s for closed_s in own if closed_s is not None]
        return min(closed) if closed else original(record, live, node, limits)

    return lost_at_s


def _reports_of_any_generation(_: Any) -> Any:
    def progressed(draft: Draft, event: Any) -> None:
        if event.session_id in draft.live.workers:
            draft.set_live(step=event.progress.step, progress=event.progress)

    return progressed


def _true(_: Any) -> Any:
    return lambda *args, **kwargs: True


def _nothing(_: Any) -> Any:
    return lambda *args, **kwargs: None


def _everybody(_: Any) -> Any:
    return lambda draft, nodes, holding: list(nodes)


def _everyone_is_ready(_: Any) -> Any:
    def is_ready(draft: Draft, node: Any) -> bool:
        return any(worker.ready is not None for worker in readiness.workers_of(draft, node.node_id))

    return is_ready


# -- the worker's state


def _takes_any_answer(_: Any) -> Any:
    def take(self: LiveState, assignment: pb.WorkerAssignment) -> None:
        if self.request is not None:
            self.request = None
            self.assignment = assignment

    return take


def _deaf_to_the_end(original: Any) -> Any:
    def hear(self: LiveState, response: pb.TrainResponse) -> list[pb.TrainRequest]:
        if response.WhichOneof("body") in ("cut", "fenced"):
            return []
        heard: list[pb.TrainRequest] = original(self, response)
        return heard

    return hear


def _commits_at_once(original: Any) -> Any:
    def moved(self: LiveState) -> None:
        original(self)
        self.committed_step = self.version.step

    return moved


def _asks_once(original: Any) -> Any:
    def opening(self: LiveState) -> list[pb.TrainRequest]:
        messages: list[pb.TrainRequest] = original(self)
        messages[0].hello.ClearField("ready")
        return messages

    return opening


def _keeps_old_version(original: Any) -> Any:
    def synchronised(self: LiveState, step: int) -> None:
        before = self.version
        original(self, step)
        if before.generation:
            self.version = replace(self.version, generation=before.generation)

    return synchronised


def _overstates(original: Any) -> Any:
    def ask(self: LiveState, **how: Any) -> pb.TrainRequest:
        kept, self.version = self.version, Version(self.generation or self.version.generation, self.version.step)
        message: pb.TrainRequest = original(self, **how)
        self.version = kept
        return message

    return ask


# -- the shells


def _swap_in_place(_: Any) -> Any:
    def synchronise(worker: Worker, place: pb.WorkerAssignment) -> training.Thread:
        step = worker.state.version.step
        if not place.in_step:
            source = max(place.source_rank, 0)
            if place.source_rank < 0 and place.rank == 0:
                yield from training._restore(worker, place)
            sent = (worker.holding, worker.cursor)
            if place.rank != source:
                worker.holding = training.torn(worker.holding)
            duration_s = worker.world.transfer_s()
            received = yield from training._collective(worker, "transfer", sent, source=source, duration_s=duration_s)
            yield from training._collective(worker, "agree", received[source][0])
            worker.holding, worker.cursor = received[source]
            step = worker.holding.step
        worker.synchronised(step)

    return synchronise


def _without_agreement(_: Any) -> Any:
    def synchronise(worker: Worker, place: pb.WorkerAssignment) -> training.Thread:
        step = worker.state.version.step
        if not place.in_step:
            source = max(place.source_rank, 0)
            if place.source_rank < 0 and place.rank == 0:
                yield from training._restore(worker, place)
            sent, duration_s = (worker.holding, worker.cursor), worker.world.transfer_s()
            received = yield from training._collective(worker, "transfer", sent, source=source, duration_s=duration_s)
            worker.holding, worker.cursor = received[source]
            step = worker.holding.step
        worker.synchronised(step)

    return synchronise


def _keeps_cursor(original: Any) -> Any:
    def synchronise(worker: Worker, place: pb.WorkerAssignment) -> training.Thread:
        cursor = worker.cursor
        yield from original(worker, place)
        worker.cursor = cursor if worker.holding.step else 0

    return synchronise


def _moves_on_failure(original: Any) -> Any:
    def step(worker: Worker) -> Any:
        world = worker.world
        state, cursor = worker.holding, worker.cursor
        try:
            return (yield from original(worker))
        except training.Broken:
            assert worker.group is not None
            worker.cursor = cursor + training.BATCH * len(worker.group.formation.places)
            # Of a sum that lacks somebody's part.
            worker.holding = training.torn(state.after(worker.state.generation, cursor, worker.cursor))
            worker.stepped(training.figures(worker.holding.step))
            world.say(worker.name, "moves, though the collective failed")
            raise

    return step


def _saves_uncommitted(original: Any) -> Any:
    def step(worker: Worker) -> Any:
        done = yield from original(worker)
        if any(each.save for each in done.values()) and worker.group is not None and worker.group.rank == 0:
            yield from training._write(worker, worker.state.generation)
        return done

    return step


def _sends_unsaved(original: Any) -> Any:
    def submit(self: Controller, *args: Any, **kwargs: Any) -> None:
        self.saves_first = False
        original(self, *args, **kwargs)

    return submit


def _forgets_its_ready(original: Any) -> Any:
    def opening(self: Agent) -> Any:
        messages = original(self)
        messages[0].hello.ClearField("ready")
        return messages

    return opening


def _believes_reports(_: Any) -> Any:
    def settle(self: History, row: GenerationSummary, steps: int, tau: float) -> list[GenerationSummary]:
        return [row]

    return settle


MUTATIONS = {
    "source-by-step-only": Mutation("the most steps win", rendezvous, "choose_source", _by_step_only),
    "no-lineage": Mutation("an older lineage may give", rendezvous, "choose_source", _without_lineage),
    "always-in-step": Mutation("in_step is claimed always", rendezvous, "choose_source", _always_in_step),
    "oldest-source": Mutation("the oldest state is given away", rendezvous, "choose_source", _oldest_source),
    "ranks-twice": Mutation("two workers have rank 0", readiness, "seat", _ranks_twice),
    "complaints-outlive-processes": Mutation(
        "who was killed stays unreachable", readiness, "forget_workers", _remember_complaints
    ),
    "partitions-are-ignored": Mutation(
        "who cannot reach each other are brought together", partition, "keep_apart", _everybody
    ),
    "an-outage-is-their-fault": Mutation("our own outage is blamed on the nodes", liveness, "note_closure", _nothing),
    "closure-is-death": Mutation("a closed stream is a death", liveness, "lost_at_s", _closure_is_death),
    "any-report-counts": Mutation(
        "older generations report", job._FACTS, ev.WorkerProgressed, _reports_of_any_generation
    ),
    "any-checkpoint-counts": Mutation("older generations save", workers, "_counts", _true),
    "half-a-node-is-ready": Mutation(
        "a node is seated with some of its workers", readiness, "is_ready", _everyone_is_ready
    ),
    "sent-before-saved": Mutation("actions go out before the save", Controller, "submit", _sends_unsaved),
    "takes-any-answer": Mutation("the answer to an earlier request counts", LiveState, "_take", _takes_any_answer),
    "deaf-to-the-end": Mutation("a cut is ignored", LiveState, "hear", _deaf_to_the_end),
    "committed-at-once": Mutation("a step counts once it is done", LiveState, "moved", _commits_at_once),
    "asks-once": Mutation("a lost request is not repeated", LiveState, "opening", _asks_once),
    "keeps-old-version": Mutation(
        "a state keeps the version of before it was synchronised", LiveState, "synchronised", _keeps_old_version
    ),
    "overstates-its-version": Mutation("a state claims the generation it is in", LiveState, "ask", _overstates),
    "swap-in-place": Mutation("the state is overwritten as it comes", training, "_synchronise", _swap_in_place),
    "no-agreement": Mutation("swapped before all have it", training, "_synchronise", _without_agreement),
    "cursor-stays-behind": Mutation("the cursor is not handed on", training, "_synchronise", _keeps_cursor),
    "moves-on-failure": Mutation("a failed collective counts", training, "_step", _moves_on_failure),
    "saves-uncommitted": Mutation("saved before it is committed", training, "_step", _saves_uncommitted),
    "no-fence": Mutation("no generation is fenced", Storage, "check", _nothing),
    "untold-steps-are-lost": Mutation(
        "the history has what reports told, and no more", History, "_settle", _believes_reports
    ),
    "agent-asks-once": Mutation("an agent's lost request is not repeated", Agent, "opening", _forgets_its_ready),
}
