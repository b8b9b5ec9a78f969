"""The controller's looks at all jobs: who is reviewed, what is saved, and how jobs share nodes."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from harness.bench import Bench
from stretto_controller.core.events import AutoscaleRequested, Event
from stretto_controller.core.goodput.allocation import Bid
from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleChange, AutoscaleMode
from stretto_controller.core.goodput.measured import Measured
from stretto_controller.core.goodput.step_time import Shape
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, JobState, Mode, Record
from stretto_controller.metrics import exposition
from stretto_controller.reviewer import Reviewer, shares
from stretto_controller.settings import ServiceLimits
from stretto_controller.store.codec import decode, encode

SERVICE = ServiceLimits(shared_nodes=8)
LINEAR = tuple(float(n) for n in range(1, 9))


def test_jobs_share_what_there_is_and_only_when_it_is_short() -> None:
    bids = [Bid("a", 1, LINEAR, nodes=4), Bid("b", 1, LINEAR, nodes=4)]
    assert shares([replace(bids[0], rates=LINEAR[:4]), replace(bids[1], rates=LINEAR[:4])], 8, SERVICE) == {}
    assert shares(bids, 8, SERVICE) == {"a": 4, "b": 4}
    assert shares([replace(bids[0], weight=3.0), bids[1]], 8, SERVICE) == {"a": 6, "b": 2}
    assert sum(shares(bids, 5, SERVICE).values()) <= 5, "nodes that are gone are given back"
    assert shares([], -3, SERVICE) == {}


async def test_a_review_predicts_and_its_outcome_is_seen_everywhere() -> None:
    bench = Bench()
    spec = JobSpec(1, 1, Mode.RESTART, 32, 32, target_tau=100.0)
    bench.join("a", "n0", spec)
    bench.now_s += 1.0
    await bench.store.finish()
    reviewer = Reviewer(bench.runner, SERVICE, Limits())
    await reviewer.review()
    assert bench.runner.view("a").recommendation is None, "nothing is known before the first step"
    await bench.train("a")
    for step in (10, 40):
        bench.now_s += 5.0
        await bench.progress("a", step=step, tau=float(step), gain=1.0, scale=1.0, variance=9.0, sqr_norm=1.0)
        await reviewer.review()
        await bench.store.finish()
    recommendation = bench.runner.view("a").recommendation
    assert recommendation is not None
    assert recommendation.nodes == 1
    size = recommendation.at(1)
    assert size is not None
    assert abs(size.step_seconds - 5.0 / 30) < 1e-9, "by the clock of the reports"
    text = exposition(bench.runner, 600.0)
    assert 'stretto_recommended_nodes{training_job="a"} 1.0' in text
    assert 'stretto_predicted_progress_rate{training_job="a",nodes="1"} 6.0' in text
    await bench.store.finish()
    saved = [save.record for save in bench.store.saved if save.record is not None]
    assert saved[-1].measured.points, "what was measured is durable"
    count = len(bench.store.saved)
    bench.now_s += 5.0
    await bench.progress("a", step=70, tau=70.0, gain=1.0, scale=1.0, variance=9.0, sqr_norm=1.0)
    await reviewer.review()
    await bench.store.finish()
    assert len(bench.store.saved) == count, "and saved once a minute, not at each review"


async def test_what_is_set_survives_the_store() -> None:
    bench = Bench()
    bench.join("a", "n0")
    bench.runner.submit("a", AutoscaleRequested(AutoscaleChange(mode=AutoscaleMode.ACT, priority=3)))
    await bench.store.finish()
    record = next(save.record for save in reversed(bench.store.saved) if save.record is not None)
    record = replace(record, measured=Measured().with_steps(Shape(2, 32.0, 2), 2, 0.1, 10).with_pause(0.4))
    again = decode(Record, encode(record))
    assert again == record
    assert again.autoscale == Autoscale(AutoscaleMode.ACT, priority=3)


async def test_an_error_costs_one_jobs_review_and_is_logged_with_its_name(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, reviewed = Bench(), []
    for job in ("a", "b", "c"):
        bench.join(job, "n0")
    await bench.store.finish()
    submit = bench.runner.submit

    def fails_for_b(job: str, event: Event) -> object:
        if job == "b":
            raise ZeroDivisionError("a fault of ours")
        reviewed.append(job)
        return submit(job, event)

    monkeypatch.setattr(bench.runner, "submit", fails_for_b)
    await Reviewer(bench.runner, SERVICE, Limits()).review()
    assert reviewed == ["a", "c"]
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage() == "job b: its size was not reviewed"
    assert line.__dict__["job"] == "b"
    assert line.exc_info is not None


async def test_reviews_go_on_after_an_error_of_any_kind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, third = Bench(), asyncio.Event()
    reviewer = Reviewer(bench.runner, ServiceLimits(review_interval_s=0.001), Limits())
    looks = itertools.count(1)

    def states() -> list[JobState]:
        if next(looks) < 3:
            raise KeyError("a fault of ours")
        third.set()
        return []

    monkeypatch.setattr(bench.runner, "states", states)
    async with asyncio.timeout(60.0):
        reviewing = asyncio.create_task(reviewer.review_on())
        await third.wait()
        reviewing.cancel()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["sizes were not reviewed"] * 2


async def test_a_job_whose_wish_cannot_be_told_does_not_keep_others_from_sharing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    for job in ("a", "b"):
        bench.join(job, "n0")
        bench.runner.submit(job, AutoscaleRequested(AutoscaleChange(mode=AutoscaleMode.ACT)))
    await bench.store.finish()

    def fails_for_b(state: JobState, pause_share: float) -> Bid:
        if state.record.name == "b":
            raise ValueError("a fault of ours")
        return Bid("a", 1, LINEAR, nodes=1)

    monkeypatch.setattr("stretto_controller.reviewer.bid", fails_for_b)
    reviewer = Reviewer(bench.runner, ServiceLimits(shared_nodes=4), Limits())
    assert reviewer._shares(bench.runner.states()) == {"a": 3}, "b keeps its node"
    assert "job b: what its sizes are worth is not known" in caplog.text
