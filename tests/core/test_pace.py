"""Slow and hung live workers are found by what the others say of their waiting, and nobody else is blamed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from core.story import Story
from stretto_controller.core import actions as ac
from stretto_controller.core import events as ev
from stretto_controller.core import pace
from stretto_controller.core.job import next_wake_s, step
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, Mode, Phase
from stretto_controller.core.report import Pace, Progress

LIMITS = Limits()
BEAT_S = LIMITS.heartbeat_interval_s
# How long rank `rank` is at its own part of step `step`.
Work = Callable[[int, int], float]


class Steps:
    """Three live workers in lockstep, as their heartbeats show them; n0, n1, n2 have one each."""

    def __init__(self, work: Work, limits: Limits = LIMITS, *, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.story = Story(JobSpec(1, 3, Mode.IN_PROCESS, base_batch_size=8, batch_size=8), limits=limits)
        self.story.lives("n0", "n1", "n2")
        self.work = work
        self.step, self.began_s = 1, 0.0
        self.durations: list[float] = []
        self.stopped: set[int] = set()
        self.beats = [0.0, 0.0, 0.0]
        self.acted: list[ac.Action] = []

    @property
    def now_s(self) -> float:
        return self.story.now_s

    def run(self, seconds: float, *, jitter_s: float = 0.0, tick_s: float = 0.5) -> list[ac.Action]:
        """Let time pass, and return what the core did meanwhile."""
        self.acted = []
        end_s, tick_at_s = self.now_s + seconds, self.now_s + tick_s
        while True:
            live = [rank for rank in range(3) if rank not in self.stopped]
            assert self.story.state is not None
            wake_s = next_wake_s(self.story.state, self.story.limits)
            times = [end_s, tick_at_s, *(self.beats[rank] for rank in live), *([] if wake_s is None else [wake_s])]
            self.story.now_s = max(self.now_s, min(times))
            self._advance()
            for rank in live:
                if self.beats[rank] <= self.now_s:
                    self.beat(rank)
                    self.beats[rank] = self.now_s + BEAT_S + self.rng.uniform(0.0, jitter_s)
                    if rank == 0 and self.step > 2:
                        # The latest step is done, and not committed yet.
                        self._feed(ev.WorkerProgressed("n0/0", Progress(1, self.step - 2)))
            if self.now_s >= tick_at_s or (wake_s is not None and wake_s <= self.now_s):
                for agent in self.story.agents.values():
                    self._feed(ev.NodeHeartbeat(agent.node_id, agent.session_id))
                self._feed(ev.Tick())
                tick_at_s = self.now_s + tick_s
            if self.now_s >= end_s:
                return self.acted

    def beat(self, rank: int) -> None:
        at_it_s = self.now_s - self.began_s
        working = rank in self.stopped or at_it_s < self.work(rank, self.step)
        median_s = sorted(self.durations[-31:])[len(self.durations[-31:]) // 2] if self.durations else 0.0
        own = self.work(rank, self.step)
        said = Pace(1, self.step, at_it_s if working else 0.0, 0.0 if working else at_it_s - own, median_s)
        self._feed(ev.WorkerAlive(f"n{rank}/0", said))

    def _advance(self) -> None:
        """Steps that have ended by now."""
        while not self.stopped:
            ends_s = self.began_s + max(self.work(rank, self.step) for rank in range(3))
            if ends_s > self.now_s:
                return
            self.durations.append(ends_s - self.began_s)
            self.step, self.began_s = self.step + 1, ends_s

    def _feed(self, event: ev.Event) -> None:
        decision = step("job", self.story.state, event, now_s=self.now_s, limits=self.story.limits)
        self.story.state = decision.state
        self.acted += decision.actions


def slow(actions: Sequence[ac.Action]) -> list[ac.LogEvent]:
    return [action for action in actions if isinstance(action, ac.LogEvent) and action.kind == "worker_slow"]


def killed(actions: Sequence[ac.Action]) -> list[str]:
    return [action.node_id for action in actions if isinstance(action, ac.StopWorkers) and action.force]


def slow_at(rank: int, at_step: int, seconds: float, usual_s: float = 0.05) -> Work:
    return lambda worker, number: seconds if (worker, number) == (rank, at_step) else usual_s


def test_a_slow_worker_is_named_once_with_step_and_times_and_goes_on() -> None:
    steps = Steps(slow_at(2, 100, 8.0))
    actions = steps.run(30.0)
    (line,) = slow(actions)
    assert line.node_id == "n2"
    assert line.generation == 1
    assert line.reason.startswith("rank 2 on n2 is slow: others have waited 1.")
    assert line.reason.endswith("s for it at step 100, and a step usually takes 0.05 s")
    assert killed(actions) == []
    assert steps.step > 200


def test_each_slow_step_is_named() -> None:
    steps = Steps(lambda rank, number: 4.0 if (rank, number) in ((1, 50), (1, 200), (0, 400)) else 0.05)
    assert [line.node_id for line in slow(steps.run(60.0))] == ["n1", "n1", "n0"]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_named_while_steps_go_on_however_heartbeats_are_delayed(seed: int) -> None:
    rng = random.Random(seed)
    usual_s = rng.choice([0.01, 0.05, 0.3, 2.0, 20.0])
    work: Work = lambda rank, number: usual_s * random.Random(f"{seed} {rank} {number}").uniform(0.2, 1.5)  # noqa: E731
    steps = Steps(work, seed=seed)
    assert slow(steps.run(300.0, jitter_s=0.4)) == [], f"seed {seed}"


def test_long_steps_have_three_medians_of_time() -> None:
    steps = Steps(slow_at(1, 10, 100.0, usual_s=10.0))
    assert slow(steps.run(100.0 + 20.0)) == []
    assert [line.node_id for line in slow(steps.run(25.0))] == ["n1"]


def test_a_frozen_worker_is_named_before_it_is_ended() -> None:
    steps = Steps(slow_at(-1, -1, 0.0))
    steps.run(10.0)
    steps.stopped.add(2)
    actions = steps.run(2.6)
    assert [line.node_id for line in slow(actions)] == ["n2"]
    assert killed(actions) == []
    assert killed(steps.run(1.0)) == ["n2"]


def test_who_speaks_but_holds_the_others_up_for_too_long_is_ended_by_its_agent() -> None:
    limits = replace(LIMITS, hang_limit_s=20.0)
    steps = Steps(slow_at(2, 100, 1e9), limits)
    actions = steps.run(24.0)
    assert [line.node_id for line in slow(actions)] == ["n2"]
    assert killed(actions) == []
    actions = steps.run(3.0)
    assert killed(actions) == ["n2"]
    reasons = [action.reason for action in actions if isinstance(action, ac.StopWorkers)]
    assert reasons[0].startswith("rank 2 on n2 hangs: others have waited 2")
    assert steps.story.state is not None
    assert steps.story.state.record.phase is Phase.RECONFIGURING


def test_a_first_step_names_nobody_since_nothing_is_usual_yet() -> None:
    steps = Steps(slow_at(0, 1, 60.0))
    assert slow(steps.run(59.0)) == []
    steps = Steps(slow_at(0, 1, 1e9), replace(LIMITS, hang_limit_s=20.0))
    assert killed(steps.run(25.0)) == ["n0"]


def test_nobody_is_blamed_when_all_wait_or_when_the_job_is_ending() -> None:
    steps = Steps(slow_at(2, 100, 1e9), replace(LIMITS, hang_limit_s=20.0))
    steps.run(4.0)
    for rank in range(3):
        steps.story.tell(ev.WorkerAlive(f"n{rank}/0", Pace(1, 100, 0.0, 60.0, 0.05)), "waits")
    steps.stopped = {0, 1, 2}
    assert slow(steps.run(0.9)) == []
    steps = Steps(slow_at(2, 100, 60.0), replace(LIMITS, hang_limit_s=20.0))
    steps.run(5.0)
    steps.story.tell(ev.WorkerFinished("n0/0", 1, 99, 100.0), "done")
    actions = steps.run(50.0)
    assert (slow(actions), killed(actions)) == ([], [])


def test_a_controller_that_was_held_up_blames_nobody_for_it() -> None:
    steps = Steps(slow_at(2, 100, 61.0))
    steps.run(5.3)
    assert steps.step == 100
    steps.story.tell(ev.WorkerAlive("n0/0", Pace(1, 100, 0.0, 0.3, 0.05)), "waits")
    steps.story.now_s += 60.0
    steps.beats = [steps.now_s + 0.7] * 3
    assert slow(steps.run(10.0)) == []


def test_who_has_just_begun_is_not_blamed_for_a_wait_that_is_over() -> None:
    """All wait for one to be synchronised; the first who is at work on the step then says so before the others do."""
    story = Story(JobSpec(1, 3, Mode.IN_PROCESS, base_batch_size=8, batch_size=8))
    story.lives("n0", "n1", "n2")
    story.now_s = LIMITS.hang_limit_s
    for node_id in ("n0", "n1"):
        story.paces(f"{node_id}/0", step=1, waiting_s=LIMITS.hang_limit_s - 0.5)
    story.paces("n2/0", step=1, working_s=0.2)
    story.now_s += 0.8
    assert story.state is not None
    (lag,) = pace.lags(story.state, LIMITS)
    assert lag.worker.node_id == "n2"
    assert lag.since_s == pytest.approx(LIMITS.hang_limit_s - 0.2)
    assert lag.hung_s is None


def test_known_progress_outdates_a_wait() -> None:
    steps = Steps(slow_at(-1, -1, 0.0))
    steps.run(3.0)
    steps.story.tell(ev.WorkerAlive("n0/0", Pace(1, steps.step, 0.0, 0.9, 0.05)), "waits")
    steps.story.tell(ev.WorkerAlive("n1/0", Pace(1, steps.step, 0.9, 0.0, 0.05)), "works")
    assert steps.story.state is not None
    assert [lag.worker.rank for lag in pace.lags(steps.story.state, LIMITS)] == [1, 2]
    steps.story.tell(ev.WorkerProgressed("n0/0", Progress(1, steps.step)), "the step is done")
    assert pace.lags(steps.story.state, LIMITS) == []


def test_the_ratio_shows_the_slowest_worker() -> None:
    steps = Steps(slow_at(1, 200, 30.0, usual_s=0.1))
    assert steps.story.state is not None
    assert pace.straggler_ratio(steps.story.state, steps.now_s) is None
    steps.run(18.0)
    ratio = pace.straggler_ratio(steps.story.state, steps.now_s)
    assert ratio is not None
    assert 0 <= ratio <= 1.01
    steps.run(12.0)
    ratio = pace.straggler_ratio(steps.story.state, steps.now_s)
    assert ratio == pytest.approx((steps.now_s - steps.began_s) / 0.1, rel=0.01)
    steps.run(30.0)
    ratio = pace.straggler_ratio(steps.story.state, steps.now_s)
    assert ratio is not None
    assert ratio <= 1.01
