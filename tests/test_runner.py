"""The runner: saved before sent, in order, each job by itself; a failed save ends it all."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from harness.bench import SPEC, Bench, hello
from stretto_controller.core.actions import Assign, AssignWorker, Dismiss, StartWorkers, WelcomeWorker
from stretto_controller.core.errors import Refusal, Rejected
from stretto_controller.core.events import (
    DeleteRequested,
    Event,
    JobCreated,
    NodeHeartbeat,
    NodeLeft,
    PauseRequested,
    ScaleRequested,
    StreamClosed,
    Tick,
    WorkerAlive,
    WorkerHello,
    WorkerLeft,
)
from stretto_controller.core.model import JobSpec, Mode, Phase, WorkerReady
from stretto_controller.logs import JsonLines
from stretto_controller.runner import Unavailable
from stretto_controller.sessions import Overflow, Replaced
from stretto_controller.store.contents import Leader, Marks, Stored, StoredJob

PAIR = JobSpec(min_nodes=2, max_nodes=2, mode=Mode.RESTART)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_an_action_is_sent_only_after_its_decision_is_saved(bench: Bench) -> None:
    stream = bench.join("a", "n0")
    assert await stream.sent() == []
    assert bench.runner.views() == [], "what is not saved was shown"
    await bench.store.finish()
    (assign,) = await stream.sent()
    assert isinstance(assign, Assign)
    assert bench.runner.view("a").record.phase is Phase.RUNNING


async def test_later_decisions_wait_for_earlier_saves_of_the_same_job(bench: Bench) -> None:
    n0, n1 = bench.join("a", "n0", PAIR), bench.join("a", "n1", PAIR)
    await bench.store.finish(1)
    assert await n0.sent() == []
    assert bench.runner.view("a").record.phase is not Phase.RUNNING
    await bench.store.finish(1)
    assert [type(action) for action in await n0.sent() + await n1.sent()] == [Assign, Assign]


async def test_an_answer_without_a_change_of_its_own_still_waits_for_the_earlier_save(bench: Bench) -> None:
    bench.join("a", "n0")
    again = bench.join("a", "n0", session_id="second")
    assert await again.sent() == []
    await bench.store.finish()
    assert any(isinstance(action, Assign) for action in await again.sent())


async def test_a_slow_save_of_one_job_does_not_hold_up_another(bench: Bench) -> None:
    bench.join("a", "n0")
    waiting = bench.store.asked.pop()
    stream = bench.join("b", "n0")
    await bench.store.finish()
    assert await stream.sent()
    assert not waiting[1].done()


async def test_heartbeats_and_progress_cost_no_save(bench: Bench) -> None:
    bench.join("a", "n0")
    await bench.store.finish()
    await bench.train("a")
    await bench.progress("a", step=1)
    saves = len(bench.store.saved)
    for step in range(2, 20):
        bench.runner.submit("a", NodeHeartbeat("n0", "a-n0"))
        await bench.progress("a", step=step, tau=float(step))
    assert len(bench.store.saved) == saves
    progress = bench.runner.view("a").progress
    assert progress is not None
    assert progress.step == 19


async def test_a_refusal_changes_nothing_and_waits_for_what_it_rests_on(bench: Bench) -> None:
    bench.join("a", "n0")
    refused = asyncio.create_task(bench.runner.decide("a", ScaleRequested(50)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not refused.done(), "the refusal told of a decision that is not saved"
    before = bench.store.asked[-1][0].record
    await bench.store.finish()
    with pytest.raises(Rejected, match="50 nodes"):
        await refused
    assert bench.runner.view("a").record is before


async def test_a_refused_event_for_an_unknown_job_leaves_no_job(bench: Bench) -> None:
    with pytest.raises(Rejected) as refusal:
        bench.runner.submit("nobody", PauseRequested())
    assert refusal.value.kind is Refusal.NOT_FOUND
    assert bench.runner.views() == []
    assert bench.store.asked == []


async def test_decide_returns_when_the_decision_is_saved_even_if_the_caller_before_gave_up(bench: Bench) -> None:
    gave_up = asyncio.create_task(bench.runner.decide("a", JobCreated(SPEC)))
    await asyncio.sleep(0)
    gave_up.cancel()
    await asyncio.sleep(0)
    assert gave_up.cancelled()
    second = asyncio.create_task(bench.runner.decide("a", ScaleRequested(1)))
    await asyncio.sleep(0)
    await bench.store.finish()
    await second
    assert bench.runner.view("a").record.desired_nodes == 1


async def test_nothing_is_sent_and_nothing_more_decided_after_a_failed_save(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    stream = bench.join("a", "n0")
    waiting = asyncio.create_task(bench.runner.decide("b", JobCreated(SPEC)))
    await asyncio.sleep(0)
    with caplog.at_level(logging.CRITICAL):
        await bench.store.fail()
    await bench.store.fail()
    assert await stream.sent() == []
    assert bench.runner.failed.is_set()
    assert not bench.runner.ready
    assert bench.runner.store_errors == 2
    assert "not acted upon: disk full" in caplog.text
    with pytest.raises(Unavailable, match="disk full"):
        await waiting
    with pytest.raises(Unavailable, match="disk full"):
        bench.runner.submit("c", JobCreated(SPEC))
    bench.runner.close_stream("a", StreamClosed("n0", "a-n0"))


async def test_a_decision_s_record_events_and_history_are_one_save(bench: Bench) -> None:
    bench.join("a", "n0")
    ((save, _),) = bench.store.asked
    assert save.record is not None
    assert [event.kind for event in save.events][-1] == "running"
    assert [event.sequence for event in save.events] == list(range(1, len(save.events) + 1))
    assert {event.time_s for event in save.events} == {bench.wall_s}
    assert [summary.generation.number for summary in save.generations] == [1]
    await bench.store.finish()
    assert bench.runner.view("a").events == save.events


async def test_a_node_s_newer_stream_takes_over_and_the_older_is_ended(bench: Bench) -> None:
    old = bench.join("a", "n0")
    await bench.store.finish()
    await old.sent()
    bench.join("a", "n0", session_id="second")
    await bench.store.finish()
    await old.sent()
    assert isinstance(old.end, Replaced)
    bench.runner.close_stream("a", StreamClosed("n0", "a-n0"))
    (node,) = bench.runner.view("a").nodes
    assert node.connected


async def test_a_refused_claim_of_a_node_s_name_does_not_redirect_its_actions(bench: Bench) -> None:
    stream = bench.join("a", "n0", PAIR)
    await bench.store.finish()
    thief = bench.open("thief")
    with pytest.raises(Rejected) as refusal:
        bench.runner.submit("a", hello("n0", "thief", PAIR, key="another"))
    assert refusal.value.kind is Refusal.DENIED
    bench.join("a", "n1", PAIR)
    await bench.store.finish()
    assert await stream.sent()
    assert await thief.sent() == []


async def test_a_peer_that_does_not_read_loses_its_stream(bench: Bench) -> None:
    stream = bench.open("s", length=2)
    for _ in range(3):
        stream.outbox.put(Dismiss("n0", True, "over"))
    assert len(await stream.sent()) == 2
    assert isinstance(stream.end, Overflow)


async def test_a_deleted_job_is_forgotten_after_its_nodes_are_told(bench: Bench) -> None:
    stream = bench.join("a", "n0")
    await bench.store.finish()
    await stream.sent()
    deleted = asyncio.create_task(bench.runner.decide("a", DeleteRequested()))
    await asyncio.sleep(0)
    assert await stream.sent() == []
    await bench.store.finish()
    await deleted
    assert bench.store.saved[-1].forget
    assert [type(action) for action in await stream.sent()] == [Dismiss]
    with pytest.raises(Rejected, match="no job 'a'"):
        bench.runner.view("a")
    bench.runner.close_stream("a", StreamClosed("n0", "a-n0"))
    bench.join("a", "n0", session_id="new life")
    await bench.store.finish()
    assert bench.runner.view("a").record.phase is Phase.RUNNING


async def test_a_restarted_runner_goes_on_with_what_was_saved() -> None:
    first = Bench()
    first.join("a", "n0")
    await first.store.finish()
    saved = first.store.saved[-1]
    assert saved.record is not None
    stored = StoredJob(saved.record, saved.marks, saved.events, saved.generations)
    second = Bench(Stored((stored,), saved.events[-1].sequence))
    await second.store.finish()
    view = second.runner.view("a")
    assert view.record.generation == saved.record.generation
    assert view.record.phase is Phase.RUNNING
    assert [node.connected for node in view.nodes] == [False]
    second.runner.submit("a", PauseRequested())
    await second.store.finish()
    sequences = [event.sequence for event in second.runner.view("a").events]
    assert sequences == sorted(set(sequences))
    assert sequences[-1] > saved.events[-1].sequence


async def test_history_of_the_current_generation_shows_what_it_has_reached_so_far(bench: Bench) -> None:
    bench.join("a", "n0")
    await bench.store.finish()
    await bench.train("a")
    await bench.progress("a", step=4, tau=6.0, generation_steps=4, generation_gain_sum=6.0)
    (summary,) = bench.runner.view("a").history
    assert (summary.steps, summary.mean_gain, summary.last_tau, summary.ended_s) == (4, 1.5, 6.0, 0.0)
    assert summary.generation.scale == 1.0


async def test_a_first_step_that_is_reported_after_its_generation_ended_is_no_news(bench: Bench) -> None:
    bench.join("a", "n0")
    await bench.store.finish()
    await bench.train("a")
    bench.runner.submit("a", PauseRequested())
    bench.runner.submit("a", WorkerLeft("a-w", 1, 3))
    await bench.progress("a", step=3)
    assert bench.runner.view("a").record.phase is Phase.RECONFIGURING
    (summary,) = bench.runner.view("a").history
    assert summary.end_reason == "paused"


async def test_finished_and_checkpointed_moments_are_kept_for_displays(bench: Bench) -> None:
    bench.join("a", "n0")
    bench.runner.submit("a", NodeLeft("n0", "a-n0", failed=True, message="out of memory"))
    await bench.store.finish()
    assert bench.runner.view("a").record.phase is Phase.FAILED
    assert bench.store.saved[-1].marks == Marks(finished_s=bench.wall_s)


async def test_a_new_job_beyond_the_limit_is_refused() -> None:
    bench = Bench(max_jobs=2)
    for job in ("a", "b"):
        bench.runner.submit(job, JobCreated(SPEC))
    with pytest.raises(Rejected, match="keeps 2 jobs and may keep 2") as refusal:
        bench.runner.submit("c", JobCreated(SPEC))
    assert refusal.value.kind is Refusal.EXHAUSTED
    bench.runner.submit("a", PauseRequested())


async def test_each_change_of_reason_is_one_log_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stretto.controller"):
        bench.join("a", "n0")
        await bench.store.finish()
        for _ in range(5):
            bench.runner.submit("a", NodeHeartbeat("n0", "a-n0"))
            bench.runner.submit("a", Tick())
    assert [record.message for record in caplog.records] == ["job a, generation 1, running: started with 1 node"]
    line = json.loads(JsonLines().format(caplog.records[0]))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "stretto.controller",
        "message": "job a, generation 1, running: started with 1 node",
        "job": "a",
        "generation": 1,
        "phase": "running",
        "reason": "started with 1 node",
    }


async def test_a_leader_that_lost_the_lead_sends_nothing_and_names_the_next_one(bench: Bench) -> None:
    stream = bench.join("a", "n0")
    other = Leader("10.0.0.2:29400", "http://10.0.0.2:8080")
    # As after a SIGSTOP: the save was acknowledged, and meanwhile another took the lead.
    bench.store.led_by = other
    await bench.store.finish()
    assert await stream.sent() == []
    assert not bench.runner.ready
    with pytest.raises(Unavailable, match=r"the one at 10\.0\.0\.2:29400 does") as refused:
        bench.runner.submit("a", PauseRequested())
    assert refused.value.leader == other
    bench.runner.lose("its lease has ended")
    assert bench.runner.failed.is_set()
    with pytest.raises(Unavailable, match="its lease has ended"):
        bench.runner.submit("a", PauseRequested())


class _Wakes:
    """Stands in for the loop's call_later."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def __call__(self, wait_s: float, *_: object) -> asyncio.Handle:
        self.waits.append(wait_s)
        return asyncio.get_running_loop().call_soon(lambda: None)


@pytest.fixture
async def wakes(monkeypatch: pytest.MonkeyPatch) -> _Wakes:
    wakes = _Wakes()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", wakes)
    return wakes


async def test_wakes_when_the_core_asks_and_at_least_every_tick_interval(bench: Bench, wakes: _Wakes) -> None:
    bench.runner.submit("a", hello("n0", "s0", JobSpec(min_nodes=1, max_nodes=2, mode=Mode.RESTART)))
    assert wakes.waits[-1] == pytest.approx(0.1), "the settle time"
    bench.runner.submit("b", JobCreated(SPEC))
    assert wakes.waits[-1] == 3600.0


async def test_frequent_events_do_not_put_the_tick_off(bench: Bench, wakes: _Wakes) -> None:
    bench.runner.submit("a", JobCreated(SPEC))
    bench.now_s += 3000.0
    bench.runner.submit("a", ScaleRequested(1))
    assert wakes.waits[-1] == pytest.approx(600.0)


def _events_of_many_nodes(count: int) -> Iterator[Event]:
    spec = JobSpec(min_nodes=count, max_nodes=count, mode=Mode.RESTART)
    for n in range(count):
        yield hello(f"n{n}", f"s{n}", spec)


async def test_nodes_that_join_together_are_all_assigned_in_one_generation(bench: Bench) -> None:
    streams = [bench.open(f"s{n}") for n in range(64)]
    for event in _events_of_many_nodes(64):
        bench.runner.submit("a", event)
    await bench.store.finish()
    sent = [await stream.sent() for stream in streams]
    assert [[type(action) for action in actions] for actions in sent] == [[Assign]] * 64


async def test_signs_of_life_cost_no_save_and_do_not_put_the_tick_off(bench: Bench, wakes: _Wakes) -> None:
    live = replace(SPEC, mode=Mode.IN_PROCESS)
    node = bench.join("a", "n0", live)
    worker = bench.open("w")
    bench.runner.submit("a", WorkerHello("w", "n0", 0, -1, 0, JobSpec(), WorkerReady(1)))
    await bench.store.finish()
    assert [type(action) for action in await node.sent()] == [StartWorkers]
    assert [type(action) for action in await worker.sent()] == [WelcomeWorker, AssignWorker]
    saves, planned = len(bench.store.saved), len(wakes.waits)
    for _ in range(10):
        bench.runner.submit("a", WorkerAlive("w"))
    assert (len(bench.store.saved) + len(bench.store.asked), len(wakes.waits)) == (saves, planned)
