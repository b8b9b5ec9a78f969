"""The ledger: which steps are committed, by the workers' own words, who holds them, and what was saved of them.

No part of the system knows that. `invariants` has the words of what must hold, and checks the controller against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulation.histories import State
from simulation.storage import Saved
from stretto_proto.v1 import training_pb2 as pb

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.groups import Collective, Formation, Membership
    from simulation.worker import Worker
    from simulation.world import World

# Who hears that its generation is over leaves it within this, beside a step's computation and the storage's time.
_LEAVE_LIMIT_S = 3.0
# Whose stream was whole for so long has been heard.
_HEARD_S = 3.0


class Broken(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, what: str, *details: object) -> None:
    """Raise Broken, in these words."""
    if not holds:
        raise Broken(what % details)


class Ledger:
    """What workers do, checked as they do it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tip: State = world.fresh
        # What was committed when each generation began from somebody's state.
        self._bases: dict[int, State] = {}
        # The newest generation that began with a checkpoint: what others held before is stale from then on.
        self._newest_restoring = 0
        # The newest generation that has committed a step.
        self._tip_generation = 0
        # What generations restored, until their first commit.
        self._restored: dict[int, State] = {}
        self._memberships: dict[int, tuple[int, ...]] = {}
        self._ranks: dict[tuple[int, int], int] = {}
        # For statistics: generations that began, steps that were committed.
        self.generations = self.steps = 0
        self.job_has_ended = False
        # Who was part of the job when it ended, and is to be released.
        self._members_at_end: list[Agent] = []
        # The latest step that the controller was told of.
        self._told_step = 0
        # When the controller was last spoken to on each stream.
        self._heard_s: dict[str, float] = {}
        # Workers that the controller let go, or had ended, while others were there that held the committed steps.
        self._let_go: set[int] = set()
        # Checkpoints of a branch that no fence had ended yet.
        self._branches: set[State] = set()
        # The keys of agents that were sent home.
        self._dismissed: set[str] = set()
        # When the controller's own network last failed.
        self._outage_s: float | None = None
        # The controller lost its disk: what it decided before binds it no longer, and histories may branch.
        self._forgotten = False

    # -- the workers

    def assigned(self, worker: Worker, place: pb.WorkerAssignment) -> None:
        """A worker has heard of its place."""
        number, ports = place.generation, tuple(each.preflight_port for each in place.places)
        require(number > worker.left or self._forgotten, "%s enters generation %s again", worker.name, number)
        known = self._memberships.setdefault(number, ports)
        require(known == ports, "generation %s has two memberships: %s and %s", number, known, ports)
        holder = self._ranks.setdefault((number, place.rank), worker.port)
        require(holder == worker.port, "rank %s of generation %s was given to two workers", place.rank, number)
        require(
            place.rank < len(ports) and ports[place.rank] == worker.port,
            "%s has rank %s of generation %s, where another process is expected",
            worker.name,
            place.rank,
            number,
        )

    def cut_heard(self, worker: Worker, number: int) -> None:
        """A worker was told that its generation is over: it leaves."""
        limit_s = _LEAVE_LIMIT_S + 2 * self._world.setup.compute_s
        self._world.scheduler.after(limit_s, self._has_left, worker, number)

    def _has_left(self, worker: Worker, number: int) -> None:
        if worker.alive and worker.always_ran_for(_LEAVE_LIMIT_S) and not self._forgotten:
            require(worker.state.generation != number, "%s stays in generation %s, which is over", worker.name, number)

    def contributed(
        self, formation: Formation, collective: Collective, kind: str, by: Membership, content: Any
    ) -> None:
        """A rank takes part in an operation."""
        require(
            collective.kind == kind,
            "in generation %s rank %s is at %s while others are at %s",
            formation.number,
            by.rank,
            kind,
            collective.kind,
        )
        if kind != "step":
            return
        self._may_be_used(content.state)
        require(
            content.cursor == content.state.end,
            "%s is at sample %s with %s, which ends at %s",
            by.worker.name,
            content.cursor,
            content.state,
            content.state.end,
        )
        for rank, other in collective.contributions.items():
            require(
                other.state is content.state,
                "in generation %s rank %s holds %s and rank %s holds %s",
                formation.number,
                rank,
                other.state,
                by.rank,
                content.state,
            )

    def _may_be_used(self, state: State) -> None:
        require(not state.torn, "a half transferred state is used: %s", state)

    def checked(self, worker: Worker, contributions: dict[int, State]) -> None:
        """All ranks have compared their states."""
        require(
            all(state is worker.holding for state in contributions.values()),
            "generation %s begins with different states: %s",
            worker.state.generation,
            contributions,
        )

    def restored(self, worker: Worker, generation: int, saved: Saved | None) -> None:
        """Rank 0 has loaded what the generation goes on from."""
        state = saved.state if saved is not None else self._world.fresh
        if not self._forgotten and generation >= self._tip_generation:
            require(
                self._tip.contains(state) or state in self._branches,
                "generation %s restores %s, which is not in the history that survives: %s",
                generation,
                state,
                self._tip,
            )
        self._restored[generation] = state

    def committed(self, worker: Worker) -> None:
        """A worker counts every step up to its committed one."""
        generation = worker.state.generation
        if generation < self._tip_generation or self._forgotten:
            return
        state = worker.holding.at(worker.state.committed_step)
        require(state is not None, "%s commits a step that it has not done", worker.name)
        assert state is not None
        base = self._restored.pop(generation, None)
        if base is not None and generation > self._tip_generation:
            require(state.contains(base), "generation %s left what it restored", generation)
            self._tip, self._told_step = state, min(self._told_step, base.step)
        elif state.contains(self._tip):
            self.steps += state.step - self._tip.step
            self._tip = state
        else:
            require(
                self._tip.contains(state),
                "%s commits %s, but committed was %s",
                worker.name,
                state,
                self._tip,
            )
        self._tip_generation = generation

    def saved(self, worker: Worker, saved: Saved) -> None:
        """A checkpoint has appeared."""
        self._may_be_used(saved.state)
        require(saved.cursor == saved.state.end, "%s saved another cursor than its state's", worker.name)
        if self._is_of_a_branch_without_fence(saved):
            self._branches.add(saved.state)
            return
        require(
            self._tip.contains(saved.state) or self._forgotten,
            "%s saved %s, but committed is %s",
            worker.name,
            saved.state,
            self._tip,
        )

    def _is_of_a_branch_without_fence(self, saved: Saved) -> bool:
        """Of a generation that was out of sight from its beginning, so that others went on from what they held before.

        Who begins with somebody's state raises no fence before it saves (docs/assumptions.md): until then the older
        one may save, too. Such a checkpoint is whole, and is loaded only where the newer one saves none.
        """
        newer = any(other.generation > saved.generation for other in self._world.storage.checkpoints)
        return self._newest_restoring <= saved.generation < self._tip_generation and not newer

    def gives_up(self, worker: Worker) -> None:
        """The controller chose this worker to save its state, as the last of the job; or it did, long ago."""
        if not self._forgotten and worker.state.version.generation >= self._tip_generation:
            require(worker.holding.contains(self._tip), "%s gives up without the committed %s", worker.name, self._tip)
            self._tip = worker.holding

    def goes(self, worker: Worker) -> None:
        """A worker that had SIGTERM ends, by the controller's word or because it lost it."""
        world = self._world
        if self._forgotten or self.job_has_ended or self._tip.step == 0 or not worker.holding.contains(self._tip):
            return
        if worker.state.version.generation < self._newest_restoring:
            # What it holds counts no more: a generation has begun with a checkpoint since, where it was out of sight.
            return
        others = (w for w in world.live_workers() if w is not worker)
        kept = any(w.holding.contains(self._tip) for w in others)
        saved = any(saved.state.contains(self._tip) for saved in world.storage.checkpoints)
        undisturbed = worker.terminated_s > max(world.controller.started_s, worker.stream.broken_s) + _HEARD_S
        undisturbed = undisturbed and world.controller.up and not world.network.cut_off
        # A node whose other worker died is ended as a whole.
        undisturbed = undisturbed and all(sibling.alive for sibling in worker.agent.workers)
        undisturbed = undisturbed and worker.port not in self._let_go
        require(kept or saved or not undisturbed, "%s goes, and with it the committed %s", worker.name, self._tip)

    def finished(self, worker: Worker) -> None:
        """A worker says that the target is reached; one of an old generation says it to nobody."""
        old = worker.state.generation < self._tip_generation
        require(
            old or self._forgotten or (worker.holding is self._tip and self._tip.step == self._world.setup.target_step),
            "%s finishes at %s; committed is %s",
            worker.name,
            worker.holding,
            self._tip,
        )
