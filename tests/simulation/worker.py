"""One training process: the real `LiveState` in a model of `stretto.live.session`, threads and signals included."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from simulation import training
from simulation.groups import Membership
from simulation.links import WORKER_BACKOFF_S, Stream
from simulation.simulated_controller import JOB
from stretto.live.state import LiveIdentity, LiveState, OnSigterm
from stretto.progress_report import StepFigures
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

if TYPE_CHECKING:
    from simulation.agent import Agent
    from simulation.world import World

# As LiveSettings and GroupSettings say.
REPORT_INTERVAL_S = 0.2
OTHER_RANKS_REPORT_INTERVAL_S = 1.0
STALLED_S = 3.0
DRAIN_LIMIT_S = 20.0
FAREWELL_LIMIT_S = 2.0
ROLL_CALL_S = 0.2


class Worker:
    """A process from its start to its end. Its training thread is the generator `training.run`."""

    def __init__(self, world: World, agent: Agent, local_rank: int) -> None:
        world.workers_started += 1
        number = world.workers_started
        self.world = world
        self.agent = agent
        self.node_id = agent.node_id
        self.local_rank = local_rank
        self.name = f"{self.node_id}/{local_rank}.{number}"
        self.port = number
        self.started_s = world.scheduler.now_s
        self.alive = True
        self.frozen = False
        # 0: well; above: failed; below: ended by that signal.
        self.exit_code: int | None = None
        first_request = world.rng.randrange(1, 2**40)
        self.state = LiveState(
            LiveIdentity(JOB, self.node_id, local_rank, number, number), _SPEC, first_request=first_request
        )
        # What it has in memory: the state, and beside it where the sampler stands.
        self.holding = world.fresh
        self.cursor = 0
        # What it tells its peers: g in generation g, -g once it has left that.
        self.standing = 0
        self.group: Membership | None = None
        self.fenced_storage = 0
        # The last generation that it left.
        self.left = 0
        # How many this process has made.
        self.steps = 0
        self.terminated = False
        self.terminated_s = 0.0
        self.failure: str | None = None
        self.lost_after_ask = False
        self.left_s = 0.0
        # Its own part of the step under way began then, and lasts beyond that if it hangs.
        self.works_since_s: float | None = None
        self.busy_until_s = 0.0
        self.pending: StepFigures | None = None
        self.stream = Stream(world, self, WORKER_BACKOFF_S)
        self._suspects: tuple[int, tuple[int, ...]] = (0, ())
        self._thread: Generator[float | None, None, None] = training.run(self)
        self._sleep = 0
        self._poked = False
        self._froze_s = 0.0
        self._sent_s = 0.0
        self._reporting = False
        world.by_port[number] = self
        world.scheduler.after(0.0, self._resume, 0)

    @property
    def runs(self) -> bool:
        return self.alive and not self.frozen

    def always_ran_for(self, seconds: float) -> bool:
        """It neither was frozen nor hung for so long."""
        return not self.frozen and self.world.scheduler.now_s - max(self._froze_s, self.busy_until_s) >= seconds

    @property
    def hangs_for_good(self) -> bool:
        return self.busy_until_s == math.inf

    # -- its training thread

    def poke(self) -> None:
        """Something has changed that the training thread may wait for."""
        if not self._poked and self.alive:
            self._poked = True
            self._sleep += 1
            self.world.scheduler.after(0.0, self._resume, self._sleep)

    def _resume(self, sleep: int) -> None:
        if sleep != self._sleep or not self.alive:
            return
        if self.frozen:
            self._poked = False
            return
        self._poked = False
        self._sleep += 1
        # None: until it is poked.
        wait_s = next(self._thread, None)
        if wait_s is not None and self.alive and not self._poked:
            self.world.scheduler.after(max(wait_s, 0.0), self._resume, self._sleep)

    # -- what happens to the process

    def kill(self, *, silently: bool = False) -> None:
        """kill -9."""
        if self.alive:
            self.world.say(self.name, "is killed")
            self.stream.die(silently=silently)
            self._end(-9, silently=silently)

    def exit(self, code: int) -> None:
        """What was said last still arrives, if the connection holds."""
        if self.alive:
            self.world.say(self.name, "exits with %d", code)
            self._flush_progress()
            self.stream.close()
            self._end(code, silently=False)

    def _end(self, code: int, *, silently: bool) -> None:
        self.alive = False
        self.exit_code = code
        if self.group is not None and self.group.open:
            self.group.open = False
            if not silently:
                self.group.formation.gone(self.group, died=True)
        self.world.standing_changed()
        self.agent.worker_ended(self)

    def freeze(self) -> None:
        self.world.say(self.name, "is frozen")
        self.frozen = True
        self._froze_s = self.world.scheduler.now_s

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.world.say(self.name, "is thawed")
        self.frozen = False
        self._froze_s = self.world.scheduler.now_s
        if self.stream.connection is not None:
            self.stream.connection.release()
        if self.group is not None and self.group.open:
            self.group.formation.retry()
        self.world.standing_changed()
        self.poke()

    def hang(self, duration_s: float) -> None:
        """Its training thread is held up where nothing can wake it."""
        self.world.say(self.name, "hangs for %.2f s", duration_s)
        # Who hangs already does not come back sooner for hanging twice.
        self.busy_until_s = max(self.busy_until_s, self.world.scheduler.now_s + duration_s)
        self._froze_s = self.busy_until_s

    def sigterm(self) -> None:
        """As LiveSession._on_sigterm."""
        if not self.alive or self.terminated:
            return
        if self.frozen:
            self.world.scheduler.after(0.3, self.sigterm)
            return
        self.world.say(self.name, "has SIGTERM")
        broken = self.group is None or not self.group.open or self.group.broken
        drain = self.state.on_sigterm(broken=broken) is OnSigterm.DRAIN
        self.terminated = True
        self.lost_after_ask = False
        self.terminated_s = self.world.scheduler.now_s
        if drain:
            self.stream.send(self.state.drain())
        elif self.state.give_up_reason is None:
            self.exit(training.TERMINATED)
            return
        self.world.scheduler.after(DRAIN_LIMIT_S, self.exit, training.TERMINATED)
        self.poke()

    # -- its conversation

    def opening(self) -> Sequence[pb.TrainRequest]:
        return self.state.opening()

    def said_again(self) -> Sequence[pb.TrainRequest]:
        return [pb.TrainRequest(ready=self.state.request)] if self.state.request is not None else []

    def hear(self, message: Any) -> None:
        before = self.state.assignment
        for answer in self.state.hear(message):
            self.stream.send(answer)
        self.world.say(self.name, "hears %s", message)
        assignment = self.state.assignment
        if assignment is not None and assignment is not before:
            self.world.invariants.assigned(self, assignment)
            self.world.faults.moment("assigned", self)
        number = self.state.generation
        # By what was said, not by what the state makes of it.
        ends = message.WhichOneof("body") in ("cut", "fenced")
        if ends and number and getattr(message, message.WhichOneof("body")).generation == number:
            self.world.invariants.cut_heard(self, number)
            self.world.faults.moment("cut", self)
        group = self.group
        if number and self.state.over(number) is not None and group is not None and group.formation.number == number:
            group.break_()
        self.poke()

    def refused(self, reason: str) -> None:
        self.world.say(self.name, "is refused: %s", reason)
        self.state.refused = True
        self.failure = reason
        if self.group is not None:
            self.group.break_()
        self.poke()

    def connection_lost(self) -> None:
        self.lost_after_ask = self.state.request is not None
        self.poke()

    def ask(self, *, failed: bool, unreachable: Sequence[int] = ()) -> None:
        """As LiveSession.ask: leave the generation, if in one, and ask for the next."""
        self._flush_progress()
        self.left = self.state.generation or self.left
        number, suspects = self._suspects
        if number and number == self.state.generation:
            unreachable = sorted({*unreachable, *suspects})
        message = self.state.ask(failed=failed, unreachable=unreachable)
        self.lost_after_ask = False
        self.left_s = self.world.scheduler.now_s
        self.world.say(self.name, "asks: %s", message)
        self.stream.send(message)
        self.world.faults.moment("ask", self)

    def begin_to_beat(self) -> None:
        self.stream.start()
        self._beat()

    def _beat(self) -> None:
        if not self.alive:
            return
        interval_s = self.state.heartbeat_interval_s or 1.0
        self.world.scheduler.after(interval_s, self._beat)
        if self.frozen:
            return
        group = self.group
        waiting_s = working_s = 0.0
        if group is not None and group.open and group.waiting_since_s is not None:
            waiting_s = self.world.scheduler.now_s - group.waiting_since_s
        elif self.works_since_s is not None:
            working_s = self.world.scheduler.now_s - self.works_since_s
        pace = self.state.alive(working_s=working_s, waiting_s=waiting_s, median_step_s=self.world.setup.compute_s)
        self.stream.send(pace)
        if group is not None and waiting_s > STALLED_S:
            self.world.scheduler.after(ROLL_CALL_S, self._roll_call, group, None)

    def _roll_call(self, group: Membership, first: set[int] | None) -> None:
        """Who has not answered; who did not answer twice is suspected, and the generation given up."""
        if not self.runs or group is not self.group or not group.open or group.broken:
            return
        silent = {rank for rank in range(len(group.formation.places)) if not self.reaches(group, rank)}
        if first is None:
            if silent:
                self.world.scheduler.after(ROLL_CALL_S, self._roll_call, group, silent)
        elif silent & first:
            self._suspects = (group.formation.number, tuple(sorted(silent & first)))
            self.world.say(self.name, "suspects ranks %s", sorted(silent & first))
            group.break_()

    def reaches(self, group: Membership, rank: int) -> bool:
        """Whether that rank's process answers."""
        peer = self.world.by_port[group.formation.places[rank]]
        return peer is self or (peer.runs and self.world.network.linked(self.node_id, peer.node_id))

    # -- what it reports

    def synchronised(self, step: int) -> None:
        """As LiveSession.synchronised."""
        self.state.synchronised(step)
        self.pending = None
        self.world.invariants.committed(self)

    def stepped(self, figures: StepFigures) -> None:
        self.committed()
        self.state.moved()
        self.steps += 1
        self.pending = figures
        self.world.invariants.committed(self)

    def committed(self) -> None:
        self.state.reduced()
        pending, self.pending = self.pending, None
        if pending is not None:
            self._report(pending)
        self.world.invariants.committed(self)

    def _report(self, figures: StepFigures) -> None:
        new = self.state.progress.generation != self.state.generation
        self.state.commit(figures, pause_s=0.0)
        if new:
            self._flush_progress()
        elif not self._reporting:
            self._reporting = True
            place = self.state.assignment
            first = place is not None and place.rank == 0
            interval_s = REPORT_INTERVAL_S if first else OTHER_RANKS_REPORT_INTERVAL_S
            wait_s = max(0.0, self._sent_s + interval_s - self.world.scheduler.now_s)
            self.world.scheduler.after(wait_s, self._report_later)

    def _report_later(self) -> None:
        self._reporting = False
        if self.runs:
            self._flush_progress()

    def _flush_progress(self) -> None:
        if self.state.progress.unsent:
            self._sent_s = self.world.scheduler.now_s
            self.stream.send(self.state.progress.message())


_SPEC = types_pb2.JobSpec(base_batch_size=training.BATCH, batch_size=training.BATCH)
