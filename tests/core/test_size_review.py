"""A job's size over time: what reviews recommend and do, told with a job whose workers are played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from core.test_properties import World
from stretto_controller.core import events as ev
from stretto_controller.core.actions import LogEvent
from stretto_controller.core.draft import Draft
from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleChange, AutoscaleMode, Goal
from stretto_controller.core.goodput.review import Circumstances, review
from stretto_controller.core.goodput.review_state import Review
from stretto_controller.core.job import step
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import (
    Cause,
    Generation,
    JobSpec,
    JobState,
    Live,
    Member,
    Mode,
    Phase,
    Record,
)
from stretto_controller.core.report import Progress

LIMITS = Limits()
ACT = Autoscale(mode=AutoscaleMode.ACT)


class Played:
    """A running job: workers that take exchange_s more together than alone, and a gradient whose noise is given."""

    def __init__(self, autoscale: Autoscale, nodes: int = 1, target_tau: float = 1e6) -> None:
        spec = JobSpec(1, 8, Mode.IN_PROCESS, base_batch_size=32, batch_size=32, target_tau=target_tau)
        self.record = Record("job", spec, phase=Phase.RUNNING, autoscale=autoscale, desired_nodes=nodes)
        self.live = Live()
        self.now_s = 0.0
        self.variance, self.sqr_norm = 0.0, 1.0
        self.step_s: Callable[[int], float] = lambda nodes: 0.1 + 0.02 * (nodes > 1) + 0.002 * nodes
        self.tau, self.steps, self.done = 0.0, 0, 0.0
        self.story: list[str] = []
        self.kinds: list[str] = []
        self.share = 2**31
        # One worker reports the noise that it knew when there were two.
        self.blind = False
        self.known = self.variance
        self.gain: Callable[[int], float] = self._gain
        self._begin(nodes)

    def _gain(self, nodes: int) -> float:
        return (self.variance + self.sqr_norm) / (self.variance / nodes + self.sqr_norm)

    def _begin(self, nodes: int) -> None:
        number = self.record.next_generation
        members = tuple(Member(f"n{i}", i, 1, i, "::1") for i in range(nodes))
        generation = Generation(number, members, float(nodes), "")
        self.record = replace(self.record, generation=generation, next_generation=number + 1)
        self.live = replace(self.live, cause=Cause.GROW if number > 1 else Cause.START, pause_s=0.2)
        self.nodes = nodes

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now_s += 1.0
            self._train()
            if self.now_s % 5 == 0:
                self.review()

    def _train(self) -> None:
        each_s = self.step_s(self.nodes)
        self.done += 1 / each_s
        steps, scale = int(self.done) - self.steps, float(self.nodes)
        gain = self.gain(self.nodes)
        if not self.blind or self.nodes > 1:
            self.known = self.variance
        self.tau += steps * gain
        self.steps += steps
        assert self.record.generation is not None
        progress = Progress(
            self.record.generation.number, self.steps, self.tau, gain, scale,
            variance=self.known, sqr_norm=self.sqr_norm,
        )  # fmt: skip
        self.live = replace(self.live, progress=progress, progress_s=self.now_s)

    def review(self, wall_s: float = 0.0) -> None:
        draft = Draft(JobState(self.record, self.live), self.now_s, LIMITS)
        review(draft, Circumstances(wall_s or self.now_s, self.share))
        self.record, self.live = draft.record, draft.live
        for line in draft.actions:
            assert isinstance(line, LogEvent)
            self.kinds.append(line.kind)
            self.story.append(line.reason)
        if self.record.wanted_nodes != self.nodes:
            self._begin(self.record.wanted_nodes)


def test_grows_when_the_gain_rises_and_gives_back_when_it_falls_without_flapping() -> None:
    job = Played(ACT)
    job.variance = 0.1
    job.run(120)
    assert (job.nodes, job.kinds) == (1, []), "all nodes bring next to nothing"
    job.variance = 50.0
    job.run(300)
    grown = job.nodes
    assert grown == 6, "beyond that the exchange eats what the floor asks for"
    changes = len(job.kinds)
    job.run(300)
    assert len(job.kinds) == changes, "it stays"
    job.variance = 0.1
    job.run(300)
    assert job.nodes == 1
    assert set(job.kinds) == {"size_chosen"}
    assert len(job.kinds) <= 6, job.story
    print("\n".join(job.story))


def test_a_size_beyond_twice_the_largest_seen_is_never_jumped_to() -> None:
    job = Played(ACT)
    job.variance = 50.0
    job.run(400)
    sizes = [int(line.split()[0]) for line in job.story]
    assert sizes == [2, 4, 6]


def test_two_changes_are_so_far_apart_that_pauses_take_a_twentieth_of_the_time() -> None:
    job = Played(ACT)
    job.live = replace(job.live, review=Review())
    job.record = replace(job.record, measured=replace(job.record.measured, pause_s=5.0))
    job.variance = 50.0
    job.run(99)
    assert job.nodes == 1
    job.run(30)
    assert job.nodes == 2


def test_noise_around_the_floor_changes_nothing() -> None:
    job = Played(ACT, nodes=4)
    job.variance = 8.0
    job.run(200)
    changes = len(job.kinds)
    for _ in range(20):
        job.variance *= 1.1
        job.run(10)
        job.variance /= 1.1
        job.run(10)
    assert len(job.kinds) == changes, job.story


def test_recommends_once_and_changes_nothing() -> None:
    job = Played(Autoscale())
    job.variance = 50.0
    job.run(300)
    assert (job.nodes, job.kinds) == (1, ["size_recommended"])
    assert job.live.recommendation is not None
    assert job.live.recommendation.nodes == 2


def test_off_predicts_and_recommends_nothing() -> None:
    job = Played(Autoscale(mode=AutoscaleMode.OFF))
    job.variance = 50.0
    job.run(100)
    assert job.live.recommendation is not None
    assert (job.live.recommendation.nodes, len(job.live.recommendation.sizes) > 1) == (0, True)
    assert job.kinds == []


def test_near_the_end_no_size_is_tried_that_cannot_pay() -> None:
    job = Played(ACT, target_tau=400.0)
    job.record = replace(job.record, measured=replace(job.record.measured, pause_s=20.0))
    job.variance = 50.0
    job.run(35)
    assert job.nodes == 1
    assert job.live.recommendation is not None
    assert "would not make up for two pauses" in job.live.recommendation.reason


def test_a_deadline_takes_the_fewest_nodes_that_meet_it() -> None:
    job = Played(Autoscale(AutoscaleMode.ACT, Goal.DEADLINE, deadline_s=600.0), target_tau=10_000.0)
    job.variance = 50.0
    job.run(300)
    assert job.live.recommendation is not None
    needed_s = job.live.recommendation.remaining_s
    assert needed_s < 300
    fewer = job.live.recommendation.at(job.nodes - 1)
    assert fewer is not None
    assert (10_000 - job.tau) / fewer.progress_rate > 300 * 0.9
    assert "fewest that reach the target in time" in job.live.recommendation.reason


def test_the_cheapest_size_is_the_smallest_where_nodes_only_cost() -> None:
    job = Played(Autoscale(AutoscaleMode.ACT, Goal.COST), nodes=4)
    job.variance = 8.0
    job.run(120)
    assert job.nodes == 1
    assert "worker-hours" in job.story[-1]


def test_more_than_the_share_is_given_back_at_once() -> None:
    job = Played(ACT, nodes=4)
    job.variance = 50.0
    job.run(60)
    job.share = 2
    job.run(10)
    assert job.nodes == 2
    assert "share of the nodes" in job.story[-1]


def test_a_rule_that_is_not_adascale_s_is_left_alone() -> None:
    job = Played(ACT, nodes=4)
    job.variance = 50.0
    job.run(20)
    assert job.live.progress is not None
    job.live = replace(job.live, progress=replace(job.live.progress, gain=1.0))
    job.review()
    assert job.live.recommendation is not None
    assert "rule is not AdaScale's" in job.live.recommendation.reason
    assert job.live.recommendation.nodes == 0


def test_one_worker_that_cannot_measure_the_noise_is_joined_by_a_second() -> None:
    job = Played(ACT)
    job.variance, job.sqr_norm = 0.0, 0.0
    job.step_s = lambda nodes: 0.1
    job.gain = lambda nodes: 1.0
    job.run(60)
    assert job.nodes == 2
    assert "one worker cannot measure it" in job.story[-1]
    assert job.live.recommendation is not None
    assert "other rules never" in job.live.recommendation.reason


def test_a_job_that_shrank_to_one_worker_sees_its_noise_rise_again() -> None:
    job = Played(ACT, nodes=2)
    job.variance = 0.1
    job.run(100)
    assert job.nodes == 1
    job.blind = True
    job.variance = 50.0
    job.run(500)
    assert job.nodes == 1, "one worker does not see it"
    job.run(300)
    assert job.nodes > 2, job.story
    assert "one worker cannot measure it" in job.story[1]


def test_what_was_measured_survives_the_controller() -> None:
    job = Played(ACT)
    job.variance = 50.0
    job.run(200)
    assert job.nodes > 1
    job.live = Live(progress=job.live.progress, progress_s=job.now_s)
    job.run(70)
    assert job.live.recommendation is not None
    assert {point.nodes for point in job.record.measured.points} >= {1, 2}


@pytest.mark.parametrize("mode", list(AutoscaleMode))
def test_who_scales_by_hand_takes_over(mode: AutoscaleMode) -> None:
    state = step("job", None, ev.JobCreated(JobSpec(1, 8, Mode.IN_PROCESS)), now_s=0.0, limits=LIMITS).state
    state = JobState(replace(state.record, autoscale=Autoscale(mode)), state.live)
    same = step("job", state, ev.ScaleRequested(8), now_s=1.0, limits=LIMITS)
    assert same.state.record.autoscale.mode is mode, "as many as before is no change"
    decision = step("job", state, ev.ScaleRequested(3), now_s=1.0, limits=LIMITS)
    assert decision.state.record.wanted_nodes == 3
    expected = AutoscaleMode.RECOMMEND if mode is AutoscaleMode.ACT else mode
    assert decision.state.record.autoscale.mode is expected


@pytest.mark.parametrize("mode", Mode)
def test_invariants_hold_while_sizes_are_reviewed_in_the_midst_of_anything(mode: Mode) -> None:
    chosen = 0
    for seed in range(100):
        world = World(seed, mode)
        for number in range(120):
            event = world.event()
            if isinstance(event, ev.WorkerProgressed):
                noisy = replace(event.progress, step=10 * number, variance=world.rng.choice([0.0, 9.0]), sqr_norm=1.0)
                event = replace(event, progress=noisy)
            world.recover() if isinstance(event, ev.Recovered) else world.feed(event)
            world.feed(ev.AutoscaleRequested(AutoscaleChange(mode=AutoscaleMode.ACT)))
            world.feed(ev.SizeReviewed(world.now_s, share=world.rng.choice([1, 2, 2**31])))
            if world.state is not None:
                record = world.state.record
                assert record.spec.min_nodes <= record.wanted_nodes <= record.spec.max_nodes, f"seed {seed}"
                chosen += record.desired_nodes > 0
    assert chosen
