"""What must hold, whatever goes wrong; every fact of a schedule is checked here as it happens.

The ledger knows what no part of the system does: which steps are committed, by the workers' own words, and who holds
them. `tip` is the state after the latest committed step.

Fencing      Nothing of a generation older than one that has committed a step counts: no report, no checkpoint.
             Who has left a generation never enters it again. A number that was heard of is never given again.
Lineage      A generation goes on from a state that contains every committed step. All its workers then hold that one.
             Where it restores a checkpoint instead, nobody present held the committed steps.
Committed    A committed step is undone only by restoring a checkpoint, and then only if it came after that.
Cursor       Each position in the stream of samples is used exactly once in the history that survives.
Ranks        One generation has one membership: ranks 0..n-1, each with one process. What `in_step` claims is true.
Progress     What the controller is told never goes back, except to a restored checkpoint, and is committed.
Checkpoints  A checkpoint is of a committed step. One that is restored belongs to the history that survives.
Verdicts     While training goes on nobody is lost for a silence or a closed stream shorter than the limits, nor for an
             outage of the controller's own network that is shorter than its grace; and who counts as hung, hangs.
             Nobody is kept apart for what was said of processes that are gone.
Farewells    Who drained and was dismissed does not join again. The last holder of the committed steps does not go
             unsaved. A job is paused when a checkpoint has them, unless too few are left to train.
History      The steps of a job's generations add up to its last committed one, if a worker has said that it is that.
Liveness     When the faults have ended the job trains to its end, or rests in a phase whose reason holds.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from core import invariants as decisions
from simulation.ledger import Broken, Ledger, require
from stretto_controller.core import actions as ac
from stretto_controller.core import events as ev
from stretto_controller.core.actions import Decision
from stretto_controller.core.model import JobState, NodeState, Phase
from stretto_controller.core.report import Checkpoint

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.worker import Worker

_FREQUENT = (ev.NodeHeartbeat, ev.WorkerAlive)
# In an outage of its network the controller sees all streams end within this.
_BLIP_S = 0.5


class Invariants(Ledger):
    """The checks of what the controller decides, and of how a schedule ends."""

    # -- the controller

    def controller_forgot_everything(self) -> None:
        self._forgotten = True
        self._memberships.clear()
        self._ranks.clear()

    def controller_recovered(self, state: JobState) -> None:
        newest = max(self._memberships, default=0)
        require(
            state.record.next_generation > newest,
            "the controller would give the number %s again, which workers heard of",
            newest,
        )
        if state.record.checkpoint is not None:
            self._checkpoint_exists(state)

    def decided(self, before: JobState | None, event: ev.Event, decision: Decision) -> None:
        """The core has decided on an event."""
        self._note_sign_of_life(event)
        if isinstance(event, ev.WorkerHello):
            self._let_go.discard(self._worker(event.session_id).port)
        if isinstance(event, _FREQUENT):
            return
        world, state = self._world, decision.state
        try:
            decisions.check(before, decision, now_s=world.scheduler.now_s, limits=world.setup.limits)
        except AssertionError as broken:
            raise Broken(f"{broken} (after {event})") from None
        for pair, apart in state.live.apart.items():
            noted_s = apart.until_s - apart.for_s
            heard = (w for node_id in pair for w in state.live.workers.of(node_id))
            new = [w.session_id for w in heard if self._worker(w.session_id).started_s > noted_s + 1e-6]
            require(not new, "%s is kept apart for what was said of those before it", new)
        progress = state.live.progress
        if progress is not None and (before is None or progress is not before.live.progress):
            self._told(progress.generation, progress.step, state)
        checkpoint = state.record.checkpoint
        if checkpoint is not None and before is not None and checkpoint is not before.record.checkpoint:
            self._checkpoint_exists(state)
            self._checkpoint_counts(before, checkpoint)
        for action in decision.actions:
            if isinstance(action, ac.BeginGeneration):
                self._begun(before, decision, action)
            elif isinstance(action, ac.LogEvent) and action.kind in ("node_lost", "workers_lost"):
                self._verdict_is_just(before, decision, action)
            elif isinstance(action, ac.LogEvent) and action.kind == "node_joined" and isinstance(event, ev.NodeHello):
                known = event.key_hash in self._dismissed and not self._forgotten
                require(not known, "%s joins again, though its agent was sent home", event.node_id)
            elif isinstance(action, ac.CloseSession):
                self._note_who_is_let_go(state, action.session_id)
            elif isinstance(action, ac.Dismiss) and before is not None and action.node_id in before.record.nodes:
                self._dismissed.add(before.record.nodes[action.node_id].key_hash)
        if state.record.phase is Phase.PAUSED and before is not None and before.record.phase is not Phase.PAUSED:
            self._what_is_paused_is_saved(before, state)
        if state.record.phase.finished and not self.job_has_ended:
            self.job_has_ended = True
            # A newer agent under a known name has not been heard yet: it begins the name anew.
            keys = {node.key_hash for node in state.record.nodes.values()}
            self._members_at_end = [agent for agent in world.agents if agent.alive and _key_hash(agent) in keys]
        ends = state.record.target_reached or state.record.phase is Phase.SUCCEEDED
        if ends and (before is None or not (before.record.target_reached or before.record.phase.finished)):
            require(
                self._tip.step >= world.setup.target_step or self._forgotten,
                "the target counts as reached at the committed step %s of %s",
                self._tip.step,
                world.setup.target_step,
            )

    def _note_sign_of_life(self, event: ev.Event) -> None:
        session_id = getattr(event, "session_id", None)
        if session_id is not None and not isinstance(event, ev.StreamClosed | ev.WorkerStreamClosed):
            self._heard_s[session_id] = self._world.scheduler.now_s

    def _told(self, generation: int, step: int, state: JobState) -> None:
        current = state.record.generation
        require(
            current is not None and current.number == generation,
            "a report of generation %s was taken in generation %s",
            generation,
            current and current.number,
        )
        if self._forgotten:
            return
        require(step <= self._tip.step, "step %s was reported; committed is %s", step, self._tip)
        require(step >= self._told_step, "the reports went back from step %s to %s", self._told_step, step)
        self._told_step = step

    def _checkpoint_counts(self, before: JobState, checkpoint: Checkpoint) -> None:
        """The controller takes note of a checkpoint."""
        generation = before.record.generation
        newest = generation.number if generation is not None else before.record.next_generation - 1
        require(
            checkpoint.generation == newest,
            "a checkpoint of generation %s was taken in generation %s",
            checkpoint.generation,
            newest,
        )

    def _checkpoint_exists(self, state: JobState) -> None:
        checkpoint = state.record.checkpoint
        assert checkpoint is not None
        exists = any(
            (saved.generation, saved.step) == (checkpoint.generation, checkpoint.step)
            for saved in self._world.storage.checkpoints
        )
        require(exists, "the controller knows of a checkpoint that does not exist: %s", checkpoint)

    def _verdict_is_just(self, before: JobState | None, decision: Decision, lost: ac.LogEvent) -> None:
        assert before is not None
        broken = before.live.failure_s is not None or any(
            isinstance(action, ac.LogEvent) and action.kind == "generation_broken" for action in decision.actions
        )
        if before.record.phase is not Phase.RUNNING or broken or self._forgotten:
            return
        node = before.record.nodes[lost.node_id]
        sessions = [w.session_id for w in before.live.workers.values() if w.node_id == lost.node_id]
        if len(sessions) < node.slots or "a new agent has its name" in lost.reason:
            return
        now_s, limits = self._world.scheduler.now_s, self._world.setup.limits
        if "the target is reached" in lost.reason:
            return
        if "hang" in lost.reason:
            own = [self._worker(session_id) for session_id in sessions]
            idle = all(worker.always_ran_for(limits.hang_limit_s) for worker in own)
            require(not idle, "%s counts as hung, and is not: %s", lost.node_id, lost.reason)
            return
        agent = before.live.sessions.get(lost.node_id)
        sessions += [agent.session_id] if agent is not None else []
        silent_s = max(now_s - self._heard_s.get(session_id, 0.0) for session_id in sessions)
        patience_s = min(limits.closed_stream_s, limits.missed_heartbeats * limits.heartbeat_interval_s)
        since_s = now_s - (self._outage_s if self._outage_s is not None else -math.inf)
        # Whose own stream had broken before the outage is silent for that.
        speakers = [self._worker(w.session_id).stream for w in before.live.workers.of(lost.node_id)]
        speakers += [each.stream for each in self._world.agents if each.alive and each.node_id == lost.node_id]
        own_fault = any(0.0 < stream.broken_s < now_s - since_s for stream in speakers)
        require(
            own_fault or not (_BLIP_S < since_s < limits.recovery_grace_s and silent_s > since_s - _BLIP_S),
            "%s was lost for an outage of the controller's network, %.2f s after that began",
            lost.node_id,
            since_s,
        )
        require(
            silent_s >= patience_s - 1e-6,
            "while training went on, %s was lost %.2f s after it was heard",
            lost.node_id,
            silent_s,
        )

    def outage(self) -> None:
        """The controller's own network fails now: all streams end. Only with two nodes or more can it be told apart."""
        state, connections = self._world.controller.state, self._world.controller.open_connections()
        nodes = {connection.speaker.node_id for connection in connections if connection.accepted}
        present = 0 if state is None else sum(n.state is not NodeState.LOST for n in state.record.nodes.values())
        if len(nodes) >= 2 and len(nodes) == present:
            self._outage_s = self._world.scheduler.now_s

    def _what_is_paused_is_saved(self, before: JobState, state: JobState) -> None:
        record = state.record
        if self._forgotten or self._tip.step == 0 or before.record.phase is not Phase.RECONFIGURING:
            return
        idle = [w for w in state.live.workers.values() if w.ready is not None and not w.closed]
        nodes = {w.node_id for w in idle if self._worker(w.session_id).runs}
        holders = [
            w
            for w in idle
            if self._worker(w.session_id).runs and self._worker(w.session_id).holding.contains(self._tip)
        ]
        saved = any(saved.state.contains(self._tip) for saved in self._world.storage.checkpoints)
        require(
            saved or not holders or len(nodes) < record.spec.min_nodes,
            "the job is paused, and nothing but memory holds the committed %s",
            self._tip,
        )

    def _begun(self, before: JobState | None, decision: Decision, begun: ac.BeginGeneration) -> None:
        """A generation begins: from whose state?"""
        self.generations += 1
        generation = begun.generation
        workers = {
            action.rank: self._worker(action.session_id)
            for action in decision.actions
            if isinstance(action, ac.AssignWorker)
        }
        require(
            sorted(workers) == list(range(generation.world_size)),
            "generation %s gives out the ranks %s of %s",
            generation.number,
            sorted(workers),
            generation.world_size,
        )
        if self._forgotten:
            return
        if generation.source_rank < 0:
            until_s = before.live.holder_until_s if before is not None else None
            if until_s is not None and self._world.scheduler.now_s >= until_s:
                # Who holds it came back by halves, and had its time.
                self._newest_restoring = generation.number
                return
            self._nobody_holds_the_tip(decision.state, generation.number)
            self._newest_restoring = generation.number
            return
        source = workers[generation.source_rank].holding
        self._may_be_used(source)
        unseen = decision.state.record.lineage.generation < self._tip_generation
        base = self._bases.get(self._tip_generation)
        if unseen and self._tip.generation == self._tip_generation and base is not None and source.contains(base):
            # The controller never heard of a step of that generation: nothing of it counts once a newer one begins.
            self._tip, self._tip_generation = base, generation.number
            self._told_step = min(self._told_step, base.step)
        self._bases[generation.number] = self._tip
        require(
            source.contains(self._tip),
            "generation %s goes on from %s, which lacks committed steps: %s",
            generation.number,
            source,
            self._tip,
        )
        if generation.in_step:
            different = [worker.name for worker in workers.values() if worker.holding is not source]
            require(not different, "generation %s is not in step: %s", generation.number, different)

    def _nobody_holds_the_tip(self, state: JobState, number: int) -> None:
        if self._tip.step == 0:
            return
        for session in state.live.workers.values():
            node = state.record.nodes.get(session.node_id)
            asks = session.ready is not None or session.generation == number
            if session.closed or not asks or node is None or node.state is NodeState.LOST:
                continue
            worker = self._worker(session.session_id)
            stale = worker.state.version.generation < self._newest_restoring
            if stale or not all(sibling.alive for sibling in worker.agent.workers):
                # The node is the unit of failure.
                continue
            if sum(session.node_id in pair for pair in state.live.apart) >= 2:
                # Of a partition the larger side goes on.
                continue
            require(
                not (worker.alive and worker.holding.contains(self._tip)),
                "generation %s restores a checkpoint, though %s holds %s",
                number,
                worker.name,
                self._tip,
            )

    def _note_who_is_let_go(self, state: JobState, session_id: str) -> None:
        """That others keep the state is judged when the controller decides on it: it cannot know who dies next."""
        alive = self._world.live_workers()
        for worker in alive:
            if not session_id.startswith(f"{worker.name}#"):
                continue
            forgotten = not state.live.workers.of(worker.node_id)
            kept = any(w.node_id != worker.node_id and w.holding.contains(self._tip) for w in alive)
            if forgotten and kept:
                self._let_go.add(worker.port)

    def _worker(self, session_id: str) -> Worker:
        name = session_id.split("#")[0]
        return self._world.by_port[int(name.rsplit(".", 1)[1])]

    # -- the end

    def rests(self) -> bool:
        """Whether the job rests in a phase whose reason holds: nothing will happen until somebody comes or asks."""
        state = self._world.controller.state
        able = self._world.faults.able_nodes()
        if state is None:
            return able == 0
        record = state.record
        match record.phase:
            case Phase.PAUSED:
                return record.paused
            case Phase.PENDING | Phase.WAITING:
                return able < record.spec.min_nodes
            case Phase.RUNNING:
                # A worker that trains alone may take as long as it likes: nobody waits for it.
                workers = [self._worker(session_id) for session_id in state.live.workers]
                return (
                    record.generation is not None
                    and record.generation.world_size == 1
                    and any(w.alive and w.hangs_for_good for w in workers)
                )
        return False

    def must_rest(self) -> None:
        """The time is over. Raise Broken."""
        state = self._world.controller.state
        where = "unknown" if state is None else f"{state.record.phase}: {state.record.reason}"
        agents = [agent.name for agent in self._world.agents if agent.alive]
        raise Broken(f"the job does not come to rest; it is {where}; {self._tip} is committed; alive: {agents}")

    def everyone_was_released(self) -> None:
        """The job has ended, and so have its agents."""
        left = [agent.name for agent in self._members_at_end if agent.alive]
        require(not left, "the job has ended, but not its agents %s", left)

    def history_adds_up(self) -> None:
        """The job has ended: each committed step is in one generation's row.

        An agent may say that its workers ended well while those are cut off from the controller.
        """
        state, controller = self._world.controller.state, self._world.controller
        if state is None or controller.told_end_of != state.record.incarnation or self._forgotten:
            return
        rows = [row for row in controller.rows.values() if row.incarnation == state.record.incarnation]
        told = [(row.generation.number, row.steps_before, row.steps) for row in rows]
        steps = sum(row.steps for row in rows) + (rows[0].steps_before if rows else 0)
        require(steps == self._tip.step, "the history has %s steps of %s: %s", steps, self._tip.step, told)


def _key_hash(agent: Agent) -> str:
    return hashlib.sha256(agent.key.encode()).hexdigest()
