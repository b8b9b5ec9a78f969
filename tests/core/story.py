"""Drives the real core on a fake clock and writes down what it did, one line per event and action."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from stretto_controller.core import actions as ac
from stretto_controller.core import events as ev
from stretto_controller.core.errors import Rejected
from stretto_controller.core.job import next_wake_s, step
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, JobState, Mode, Ready, Version, WorkerReady
from stretto_controller.core.report import Checkpoint, Pace, Progress

LIMITS = Limits()
NO_STATE = Version()


@dataclass
class Agent:
    """The node's side: just enough to answer as a well-behaved agent does."""

    node_id: str
    slots: int
    session_id: str
    requests: int = 0
    generation: int = 0

    def ready(self, *, failed: bool = False, exit_signal: int = 0, restarts_left: int = -1) -> Ready:
        self.requests += 1
        return Ready(self.requests, self.generation, failed, exit_signal, restarts_left)


@dataclass
class Story:
    """A job's life, told event by event; `lines` is the golden trace."""

    spec: JobSpec = field(default_factory=lambda: JobSpec(1, 4, Mode.RESTART))
    limits: Limits = LIMITS
    name: str = "job"
    now_s: float = 0.0
    state: JobState | None = None
    lines: list[str] = field(default_factory=list)
    agents: dict[str, Agent] = field(default_factory=dict)
    streams: int = 0
    asked: int = 0
    # Live workers that say nothing more.
    hung: set[str] = field(default_factory=set)

    def tell(self, event: ev.Event, line: str) -> tuple[ac.Action, ...]:
        """Feed one event; note what was decided."""
        self.lines.append(f"{self.now_s:7.2f}  {line}")
        try:
            decision = step(self.name, self.state, event, now_s=self.now_s, limits=self.limits)
        except Rejected as refusal:
            self.lines.append(f"           ! {refusal.kind}: {refusal.message}")
            return ()
        before = self.state.record.phase if self.state else None
        self.state = decision.state
        for action in decision.actions:
            self._obey(action)
            self.lines.append(f"           -> {describe(action)}")
        if decision.state.record.phase is not before:
            self.lines.append(f"           = {decision.state.record.phase}: {decision.state.record.reason}")
        return decision.actions

    def _obey(self, action: ac.Action) -> None:
        if isinstance(action, ac.Assign) and action.node_id in self.agents:
            self.agents[action.node_id].generation = action.generation.number

    def passes(self, seconds: float) -> None:
        """Let time pass, ticking as the runner does: when the core wants to wake, and every half second."""
        end_s = self.now_s + seconds
        while self.state is not None and self.now_s < end_s:
            wake_s = next_wake_s(self.state, self.limits)
            times = [end_s, self.now_s + 0.5] + ([wake_s] if wake_s is not None else [])
            self.now_s = max(self.now_s, min(times))
            for agent in self.agents.values():
                self._quietly(ev.NodeHeartbeat(agent.node_id, agent.session_id))
            for worker in list(self.state.live.workers.values()):
                if worker.session_id not in self.hung and not worker.closed:
                    self._quietly(ev.WorkerAlive(worker.session_id))
            before = len(self.lines)
            self.tell(ev.Tick(), "tick")
            if len(self.lines) == before + 1:
                self.lines.pop()
        self.now_s = end_s

    def is_held_up(self, seconds: float) -> None:
        """The controller itself does nothing for a while; what is said meanwhile waits to be read."""
        self.now_s += seconds

    def _quietly(self, event: ev.Event) -> None:
        assert self.state is not None
        self.state = step(self.name, self.state, event, now_s=self.now_s, limits=self.limits).state

    def hello(self, node_id: str, *, slots: int = 1, key: str = "", ready: Ready | None = None) -> None:
        """The node opens a stream, for the first time or again."""
        self.streams += 1
        agent = self.agents.setdefault(node_id, Agent(node_id, slots, ""))
        agent.session_id = f"s{self.streams}"
        event = ev.NodeHello(
            node_id,
            hashlib.sha256((key or node_id).encode()).hexdigest(),
            agent.session_id,
            slots,
            "127.0.0.1",
            self.spec,
            agent.generation,
            ready,
        )
        self.tell(
            event, f"{node_id} says hello" + (f" (workers of generation {agent.generation})" * bool(agent.generation))
        )

    def joins(self, *node_ids: str, slots: int = 1) -> None:
        """Nodes come for the first time, ready for work."""
        for node_id in node_ids:
            self.hello(node_id, slots=slots)
            self.ready(node_id)

    def ready(self, *node_ids: str, failed: bool = False, exit_signal: int = 0, restarts_left: int = -1) -> None:
        for node_id in node_ids:
            agent = self.agents[node_id]
            ready = agent.ready(failed=failed, exit_signal=exit_signal, restarts_left=restarts_left)
            how = f", its workers failed (signal {exit_signal})" if failed else ""
            self.tell(ev.NodeReady(node_id, agent.session_id, ready), f"{node_id} is ready{how}")

    def succeeds(self, *node_ids: str) -> None:
        for node_id in node_ids:
            agent = self.agents[node_id]
            event = ev.NodeSucceeded(node_id, agent.session_id, agent.generation)
            self.tell(event, f"workers of {node_id} ended well")

    def dies(self, node_id: str) -> None:
        """kill -9 of the agent: its stream closes, and nothing more is heard."""
        agent = self.agents.pop(node_id)
        self.tell(ev.StreamClosed(node_id, agent.session_id), f"the stream of {node_id} closes")

    def loses_its_stream(self, node_id: str) -> None:
        """A blip: the stream closes, the agent lives."""
        self.tell(ev.StreamClosed(node_id, self.agents[node_id].session_id), f"the stream of {node_id} closes")

    def freezes(self, node_id: str) -> None:
        """The node falls silent, its stream open."""
        self.agents.pop(node_id)
        self.lines.append(f"{self.now_s:7.2f}  {node_id} falls silent")

    def leaves(self, node_id: str, *, failed: bool = False) -> None:
        agent = self.agents.pop(node_id)
        event = ev.NodeLeft(node_id, agent.session_id, failed=failed)
        self.tell(event, f"{node_id} leaves" + (", having failed" if failed else ""))

    def worker(self, node_id: str, rank: int, *, spec: JobSpec | None = None) -> str:
        """A training process opens its stream; returns the stream's name."""
        agent = self.agents[node_id]
        session_id = f"w{rank}.{agent.generation}"
        local_rank = rank - self._first_rank(node_id)
        event = ev.WorkerHello(session_id, node_id, local_rank, rank, agent.generation, spec or JobSpec())
        self.tell(event, f"worker {rank} of {node_id} says hello")
        return session_id

    def _first_rank(self, node_id: str) -> int:
        assert self.state is not None
        assert self.state.record.generation is not None
        return next(m.first_rank for m in self.state.record.generation.members if m.node_id == node_id)

    def current(self) -> int:
        assert self.state is not None
        assert self.state.record.generation is not None
        return self.state.record.generation.number

    def steps(self, rank: int, step: int, *, tau: float = 0.0, gain: float = 1.0) -> None:
        number = self.current()
        progress = Progress(number, step, tau=tau, gain=gain, generation_steps=step, generation_gain_sum=gain * step)
        self.tell(ev.WorkerProgressed(f"w{rank}.{number}", progress), f"worker {rank} is at step {step}")

    def worker_left(self, rank: int, step: int) -> None:
        number = self.current()
        self.tell(ev.WorkerLeft(f"w{rank}.{number}", number, step), f"worker {rank} left after step {step}")

    def checkpointed(self, rank: int, step: int) -> None:
        number = self.current()
        checkpoint = Checkpoint(number, step, float(step), f"step-{step}")
        self.tell(ev.CheckpointCommitted(f"w{rank}.{number}", checkpoint), f"checkpoint at step {step}")

    # In-process mode: live workers speak for themselves. Worker "n0/1" is local rank 1 of n0.

    def lives(self, *node_ids: str, slots: int = 1, step: int = 0, generation: int = 0) -> None:
        """A node comes, is told to start its workers, and they ask for their places, with a state of that version."""
        for node_id in node_ids:
            self.hello(node_id, slots=slots)
            self.ready(node_id)
            for local_rank in range(slots):
                self.worker_comes(node_id, local_rank, version=Version(generation, step))

    def worker_comes(self, node_id: str, local_rank: int = 0, *, version: Version = NO_STATE) -> None:
        self.asked += 1
        session_id = f"{node_id}/{local_rank}"
        ready = WorkerReady(self.asked, version.generation, version)
        event = ev.WorkerHello(session_id, node_id, local_rank, -1, 0, JobSpec(), ready)
        self.tell(event, f"worker {session_id} asks for its place, {_state(version)}")

    def asks(self, *session_ids: str, step: int, failed: bool = False, unreachable: tuple[int, ...] = ()) -> None:
        """Live workers ask again: after an agreed step, or because their generation broke."""
        for session_id in session_ids:
            self.asked += 1
            number = self.current()
            ready = WorkerReady(self.asked, number, Version(number, step), failed, unreachable)
            how = "lost its peers" if failed else "left"
            far = f" (cannot reach ranks {unreachable})" if unreachable else ""
            self.tell(ev.WorkerAsked(session_id, ready), f"worker {session_id} {how} after step {step}{far}")

    def sigterm(self, session_id: str) -> None:
        self.tell(ev.WorkerDraining(session_id, self.current()), f"worker {session_id} had SIGTERM")

    def saves(self, session_id: str, step: int) -> None:
        """A live worker writes a checkpoint, in a generation or after its last one."""
        assert self.state is not None
        checkpoint = Checkpoint(self.state.record.next_generation - 1, step, float(step), f"step-{step}")
        self.tell(ev.CheckpointCommitted(session_id, checkpoint), f"checkpoint at step {step}")

    def worker_ready(self, generation: int, *, step: int, failed: bool) -> WorkerReady:
        """What a live worker asks that stood at that step of that generation."""
        self.asked += 1
        return WorkerReady(self.asked, generation, Version(generation, step), failed)

    def live_steps(self, session_id: str, step: int) -> None:
        self.tell(ev.WorkerProgressed(session_id, Progress(self.current(), step)), f"{session_id} is at step {step}")

    def paces(self, session_id: str, *, step: int, working_s: float = 0.0, waiting_s: float = 0.0) -> None:
        """A heartbeat, with what the worker does at that step; 0.1 s is usual."""
        pace = Pace(self.current(), step, working_s, waiting_s, 0.1)
        what = f"waits for the others for {waiting_s:g} s" if waiting_s else f"works for {working_s:g} s"
        self.tell(ev.WorkerAlive(session_id, pace), f"{session_id} is at step {step} and {what}")

    def hangs(self, session_id: str) -> None:
        """The worker falls silent, its stream open."""
        self.hung.add(session_id)
        self.lines.append(f"{self.now_s:7.2f}  {session_id} falls silent")

    def vanishes(self, node_id: str, *session_ids: str) -> None:
        """kill -9 of a node: all its streams close."""
        for session_id in session_ids:
            self.tell(ev.WorkerStreamClosed(session_id), f"the stream of worker {session_id} closes")
        self.dies(node_id)

    def crashes_and_recovers(self, *, after_s: float = 2.0) -> None:
        """The controller dies and starts again from the saved record, on a new clock."""
        assert self.state is not None
        self.lines.append(f"{self.now_s:7.2f}  the controller is killed")
        self.state = JobState(self.state.record)
        self.now_s += after_s
        self.tell(ev.Recovered(), "the controller starts again")

    def retold(self, **changes: object) -> None:
        self.spec = replace(self.spec, **changes)  # type: ignore[arg-type]  # checked by the dataclass


def _state(version: Version) -> str:
    return f"state of generation {version.generation}, step {version.step}" if version > NO_STATE else "without state"


def describe(action: ac.Action) -> str:
    """One line for one action, in the protocol's words."""
    match action:
        case ac.Assign(node_id, request_id, generation, at_fault):
            rank = generation.node_ids.index(node_id)
            fault = ", at fault" if at_fault else ""
            return (
                f"assign {node_id}: generation {generation.number}, node {rank} of {len(generation.members)}, "
                f"ranks {generation.members[rank].first_rank}.. of {generation.world_size}, request {request_id}{fault}"
            )
        case ac.BeginGeneration(generation, cause):
            members = " ".join(generation.node_ids)
            source = ""
            if generation.members[0].seats:
                known = f"from rank {generation.source_rank}" if generation.source_rank >= 0 else "from the checkpoint"
                source = "; all have the state" if generation.in_step else f"; state {known}"
            return f"generation {generation.number} begins ({cause}): {members}; S = {generation.scale:g}{source}"
        case ac.AssignWorker(session_id, request_id, generation, rank):
            return f"seat {session_id}: generation {generation.number}, rank {rank}, request {request_id}"
        case ac.CutGeneration(session_id, generation, reason):
            return f"cut {session_id} out of generation {generation}: {reason}"
        case ac.StartWorkers(node_id, request_id, at_fault):
            return f"let {node_id} start its workers, request {request_id}{', at fault' * at_fault}"
        case ac.SaveAndExit(session_id, reason):
            return f"tell {session_id} to save and exit: {reason}"
        case ac.EndGeneration(generation=generation, steps=steps, reason=reason):
            return f"generation {generation.number} ends after {steps} steps: {reason}"
        case ac.ReachTarget(generation, steps, _):
            return f"generation {generation} reaches the target after {steps} steps of the job"
        case ac.LogEvent(kind, reason, _, _):
            return f"[{kind}] {reason}"
        case ac.StopWorkers(node_id, generation, _, force):
            return f"{'kill' if force else 'stop'} the workers of {node_id} (generation {generation})"
        case ac.Dismiss(node_id, success, reason):
            return f"dismiss {node_id} ({'well' if success else 'failed'}): {reason}"
        case ac.FirstStep(generation, cause, pause_s):
            return f"first step of generation {generation} after a pause of {pause_s:.2f} s ({cause})"
        case ac.AskToLeave(session_id, generation, _, save):
            return f"ask {session_id} to {'save and ' * save}leave generation {generation}"
        case ac.AskToSave(session_id, generation, reason):
            return f"ask {session_id} to save in generation {generation}: {reason}"
        case ac.FenceWorker(session_id, generation, reason):
            return f"fence {session_id}: {reason}"
        case _:
            return repr(action)
