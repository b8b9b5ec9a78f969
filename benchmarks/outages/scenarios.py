"""One disturbance after the other in a job of three nodes, and what each cost the workers that live on."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from outages.cluster import Cluster, Never, Setup, cluster
from outages.timeline import USUAL_STEPS, Row

NODES = 3
# The controller's defaults: silent for so long, a member is lost.
MISSED_HEARTBEATS_S = 3.0
# Before a disturbance, since the one before; and after it, at least.
CALM_S, AFTERMATH_S = 1.5, 0.5
CONTROLLER_AFTERMATH_S = 3.0


@dataclass(frozen=True)
class Figure:
    """goal: as the median; in seconds, but for counts."""

    title: str
    goal: float | None = None
    unit: str = "s"


FIGURES = {
    "node": Figure("node killed: others' next step", 0.3),
    "leader": Figure("rank 0's node killed: others' next step", 0.3),
    "worker": Figure("worker killed: others' next step", 0.3),
    "return": Figure("worker killed: its own next step"),
    "hang": Figure(f"worker stopped: others' next step, beyond {MISSED_HEARTBEATS_S:g} s", 0.3),
    "join": Figure("node joins: others' pause", 0.5),
    "drain": Figure("node drained: others' pause", 0.3),
    "repeated": Figure("node drained: steps repeated", 0, unit=""),
    "controller": Figure("controller killed, restarted: pause", 0.3),
    "large join": Figure("25M parameters, node joins: others' pause"),
    "large node": Figure("25M parameters, node killed: others' next step"),
}


@dataclass
class Findings:
    """What one setup's repetitions gave; infinite: never."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    # By figure and stage, of the worker that was the last to recover.
    stages: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    # How long after the event the recovering workers' loops asked for their next step; 0: they were in one already.
    paced_s: list[float] = field(default_factory=list)
    usual_step_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    state_bytes: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One job under way, and where its findings go."""

    job: Cluster
    rng: random.Random
    findings: Findings
    limit_s: float
    prefix: str = ""

    def prepare(self, nodes: int) -> None:
        """Have so many nodes train together, as they have for a while."""
        started_s = time.monotonic()
        while len(self.job.nodes) > nodes:
            self.job.kill_node(self.follower())
        while len(self.job.nodes) < nodes:
            self.job.start_node()
        self.job.wait_together(started_s, self.limit_s)
        self.calm()

    def calm(self) -> None:
        """Let them train until it is known how long a usual step takes."""
        time.sleep(CALM_S)
        timeline = self.job.timeline
        self.job.wait(
            lambda: all(timeline.steps_in_place(name) > USUAL_STEPS for name in self.job.nodes),
            self.limit_s,
            f"{USUAL_STEPS} steps",
        )

    def follower(self) -> str:
        """Any node but the leader's."""
        return self.rng.choice([name for name in self.job.nodes if name != self.job.leader()])

    def next_step(self, figure: str, nodes: list[str], event_s: float, *, allowed_s: float = 0.0) -> None:
        """Wait until all these have gone on after an event, and note when the last one did."""
        timeline = self.job.timeline
        rows: list[Row] = []

        def recovered() -> bool:
            rows[:] = [row for name in nodes if (row := timeline.recovered(name, event_s)) is not None]
            return len(rows) == len(nodes)

        self.job.wait(recovered, self.limit_s, FIGURES[self.prefix + figure].title)
        last = max(rows, key=lambda row: row.done_s)
        self.note(figure, last.done_s - event_s - allowed_s)
        if self.job.setup.ours and figure != "return":
            self.findings.paced_s += [max(0.0, row.asked_s - event_s) for row in rows]
        self._note_stages(figure, last, event_s)

    def pause(self, figure: str, nodes: list[str], event_s: float) -> None:
        """Note the longest gap between two steps of any of these since an event, beyond a usual step."""
        timeline, now_s = self.job.timeline, time.monotonic()
        timeline.update()
        usual_s = timeline.usual_step_s(nodes, event_s)
        self.findings.usual_step_s[self.prefix + figure].append(usual_s)
        self.note(figure, max(timeline.longest_gap(name, event_s, now_s) for name in nodes) - usual_s)
        changed = [row for name in nodes if (row := timeline.recovered(name, event_s)) is not None]
        if changed:
            last = max(changed, key=lambda row: row.done_s)
            self._note_stages(figure, last, timeline.step_before(last).done_s)

    def note(self, figure: str, value: float) -> None:
        """Keep a value, and show it, since a whole comparison takes long."""
        self.findings.values[self.prefix + figure].append(value)
        what = FIGURES[self.prefix + figure]
        print(f"{self.job.setup.name}: {what.title}: {value:.3f} {what.unit}", file=sys.stderr, flush=True)

    def _note_stages(self, figure: str, row: Row, start_s: float) -> None:
        for stage, seconds in self.job.timeline.stages(row, start_s).items():
            self.findings.stages[self.prefix + figure][stage].append(seconds)


def kill_a_node(run: Run) -> None:
    event_s = run.job.kill_node(run.follower())
    run.next_step("node", run.job.nodes, event_s)


def kill_the_leader(run: Run) -> None:
    event_s = run.job.kill_node(run.job.leader())
    run.next_step("leader", run.job.nodes, event_s)


def kill_a_worker(run: Run) -> None:
    victim = run.follower()
    event_s = run.job.signal_worker(victim, signal.SIGKILL)
    run.next_step("worker", [name for name in run.job.nodes if name != victim], event_s)
    run.next_step("return", [victim], event_s)


def stop_a_worker(run: Run) -> None:
    victim = run.follower()
    event_s = run.job.signal_worker(victim, signal.SIGSTOP)
    others = [name for name in run.job.nodes if name != victim]
    run.next_step("hang", others, event_s, allowed_s=MISSED_HEARTBEATS_S)
    run.job.wait_together(time.monotonic(), run.limit_s)


def add_a_node(run: Run) -> None:
    others, event_s = list(run.job.nodes), time.monotonic()
    run.job.start_node()
    run.job.wait_together(event_s, run.limit_s)
    time.sleep(AFTERMATH_S)
    run.pause("join", others, event_s)


def drain_a_node(run: Run) -> None:
    event_s = run.job.drain(run.follower())
    run.job.wait_together(event_s, run.limit_s)
    time.sleep(AFTERMATH_S)
    run.pause("drain", run.job.nodes, event_s)
    if run.job.setup.ours:
        run.note("repeated", run.job.timeline.repeated(event_s - CALM_S, time.monotonic()))


def restart_the_controller(run: Run) -> None:
    event_s = run.job.restart_controller()
    time.sleep(CONTROLLER_AFTERMATH_S)
    run.pause("controller", run.job.nodes, event_s)


Scenario = Callable[[Run], None]
# By the first figure that each gives. A node joins those that are left, or began; what may end torchrun's job for good
# comes last.
SCENARIOS: dict[str, Scenario] = {
    "join": add_a_node,
    "worker": kill_a_worker,
    "node": kill_a_node,
    "drain": drain_a_node,
    "controller": restart_the_controller,
    "hang": stop_a_worker,
    "leader": kill_the_leader,
}
ONLY_OURS = {"controller"}
LARGE = ("join", "node")
SMALL_PARAMETERS, LARGE_PARAMETERS = 4096, 25_000_000


def measure(
    setup: Setup,
    names: list[str],
    findings: Findings,
    *,
    repetitions: int,
    limit_s: float,
    seed: int,
    pace_s: float,
    large: bool = False,
) -> None:
    """Put one setup through these scenarios, so many times each; a new job replaces one that does not recover."""
    todo = [name for _ in range(repetitions) for name in names if setup.ours or name not in ONLY_OURS]
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "parameters": LARGE_PARAMETERS if large else SMALL_PARAMETERS,
        "pace_s": pace_s,
        "checkpoints": False,
    }
    attempts = len(todo) + 1
    while todo and attempts:
        attempts -= 1
        with cluster(setup, **options) as job:
            run = Run(job, rng, findings, limit_s, "large " if large else "")
            try:
                _until_broken(run, todo)
            except Never as never:
                findings.failures.append(f"{setup.name}: {never}")
                if setup.ours:
                    findings.failures.append(job.story("its agents said:"))
            findings.state_bytes = max(findings.state_bytes, job.timeline.state_bytes())


def _until_broken(run: Run, todo: list[str]) -> None:
    """Go through what is to be done; raises Never at what the job does not recover from, which is done then."""
    while todo:
        run.prepare(NODES - 1 if todo[0] == "join" else NODES)
        name = todo.pop(0)
        try:
            SCENARIOS[name](run)
        except Never:
            run.note(name, float("inf"))
            raise
