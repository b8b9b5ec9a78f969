"""Unplanned ends: peers die or freeze while the group works, and a cut releases the training thread wherever it is."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence

import pytest
from group.fleet import Fleet, Process
from stretto.group import GroupSettings

pytestmark = pytest.mark.e2e

RELEASE_LIMIT_S = 4.0  # milliseconds on a quiet machine; without the cut it is the operations' timeout of 8 s
SETTINGS = GroupSettings(operation_timeout_s=8.0)


def work(members: Sequence[Process], *, numel: int, in_flight: int, for_s: float) -> None:
    for member in members:
        member.tell("reduce", numel=numel, in_flight=in_flight, rounds=0)
    time.sleep(for_s)


def released(survivors: Sequence[Process], since_s: float) -> None:
    for survivor in survivors:
        assert survivor.expect("broken")["released_s"] - since_s < RELEASE_LIMIT_S


@pytest.mark.parametrize(("numel", "in_flight"), [(1_000, 1), (500_000, 8)])
def test_a_killed_peer_releases_everyone_without_a_word_from_the_controller(numel: int, in_flight: int) -> None:
    rng = random.Random(numel)
    with Fleet(4, SETTINGS) as fleet:
        for _ in range(3):
            members = rng.sample(fleet.processes, 4)
            fleet.form(members)
            work(members, numel=numel, in_flight=in_flight, for_s=rng.uniform(0.05, 0.3))
            killed_s = members[0].kill()
            fleet.processes.remove(members[0])
            released(members[1:], killed_s)
            fleet.leave(members[1:])
            fleet.form(members[1:])
            fleet.leave(members[1:])
            fleet.add()


@pytest.mark.parametrize(("numel", "in_flight"), [(1_000, 1), (500_000, 8), (2_000_000, 8)])
def test_a_frozen_peer_is_cut_off_and_refused_when_it_thaws(numel: int, in_flight: int) -> None:
    """With much in flight messages are partly sent when the peer freezes: those waiters do not notice their socket."""
    rng = random.Random(numel + in_flight)
    with Fleet(4, SETTINGS) as fleet:
        for _ in range(3):
            members = rng.sample(fleet.processes, 4)
            frozen, survivors = members[0], members[1:]
            fleet.form(members)
            work(members, numel=numel, in_flight=in_flight, for_s=rng.uniform(0.05, 0.3))
            frozen.signal(signal.SIGSTOP)
            time.sleep(0.05)
            cut_s = time.monotonic()
            for survivor in survivors:
                survivor.cut(fleet.generation, "rank 0 does not answer")
            released(survivors, cut_s)
            fleet.leave(survivors)
            fleet.form(survivors)
            fleet.leave(survivors)
            frozen.signal(signal.SIGCONT)
            frozen.expect("broken")
            fleet.leave([frozen])
        assert [each["firings"] for each in fleet.figures()] == [0, 0, 0, 0]


def test_two_of_four_die_at_once() -> None:
    with Fleet(4, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        work(fleet.processes, numel=100_000, in_flight=4, for_s=0.1)
        killed_s = fleet.processes[1].kill()
        fleet.processes.pop(3).kill()
        fleet.processes.pop(1)
        released(fleet.processes, killed_s)
        fleet.leave(fleet.processes)
        fleet.form(fleet.processes)


@pytest.mark.parametrize("name", ["all_reduce", "broadcast", "barrier"])
def test_a_cut_releases_a_thread_that_waits_alone(name: str) -> None:
    with Fleet(2, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        waiting = fleet.processes[0]
        waiting.tell("operation", name=name)
        time.sleep(0.1)
        cut_s = time.monotonic()
        waiting.cut(fleet.generation, "the test says so")
        answer = waiting.expect("broken")
        assert answer["released_s"] - cut_s < RELEASE_LIMIT_S
        assert answer["reason"] == "generation 1: the test says so"
        assert answer["unreachable"] == ()


def test_backward_is_released_and_training_goes_on_in_the_next_generation() -> None:
    with Fleet(3, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        for process in fleet.processes:
            process.tell("train", steps=0, width=700, layers=4)
        time.sleep(0.5)
        frozen, survivors = fleet.processes[0], fleet.processes[1:]
        frozen.signal(signal.SIGSTOP)
        time.sleep(0.1)
        cut_s = time.monotonic()
        for survivor in survivors:
            survivor.cut(fleet.generation, "rank 0 does not answer")
        released(survivors, cut_s)
        fleet.leave(survivors)
        fleet.form(survivors)
        for survivor in survivors:
            survivor.tell("train", steps=3, width=700, layers=4)
        for survivor in survivors:
            assert survivor.expect("trained")["done"] == 3


def test_a_cut_releases_forward_where_ddp_talks_by_itself() -> None:
    """Before its second forward DDP broadcasts an order of buckets, by a call that is not ours: its socket is."""
    with Fleet(3, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        absent, *others = fleet.processes
        for process in fleet.processes:
            process.tell("train", steps=1 if process is absent else 0, width=64, layers=3)
        absent.expect("trained")
        time.sleep(0.3)
        cut_s = time.monotonic()
        for process in others:
            process.cut(fleet.generation, "rank 0 does not answer")
        released(others, cut_s)
        fleet.leave(fleet.processes)
        fleet.form(fleet.processes)


def test_a_dead_peer_is_noticed_although_its_child_holds_its_sockets_and_nobody_computes() -> None:
    with Fleet(2, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        dying, other = fleet.processes
        dying.tell("fork")
        child = dying.expect("done")["child"]
        try:
            other.tell("operation", name="all_reduce")
            killed_s = dying.kill()
            answer = other.expect("broken")
        finally:
            os.kill(child, signal.SIGKILL)
        assert answer["released_s"] - killed_s < RELEASE_LIMIT_S
        assert answer["reason"] == "generation 1: rank 0: its process ended"
        assert answer["unreachable"] == (0,)


def test_a_cut_that_comes_before_the_build_ends_it() -> None:
    with Fleet(2, SETTINGS) as fleet:
        first, second = fleet.processes
        first.cut(1, "early news")
        first.expect("cut")
        fleet.begin(fleet.processes)
        first.expect("superseded")
        assert "gave it up" in second.expect("failed")["reason"]
        fleet.form(fleet.processes)


def test_the_first_cut_counts_and_later_operations_fail_at_once() -> None:
    with Fleet(2, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        first = fleet.processes[0]
        for reason in ("first", "second"):
            first.cut(fleet.generation, reason)
            first.expect("cut")
        first.tell("operation", name="all_reduce")
        assert first.expect("broken")["reason"] == "generation 1: first"


def test_who_is_gone_and_who_is_silent_is_told_apart() -> None:
    with Fleet(4, SETTINGS) as fleet:
        fleet.form(fleet.processes)
        asked, dead, frozen, _ = fleet.processes
        frozen.signal(signal.SIGSTOP)
        dead.kill()
        asked.tell("unreachable")
        who = asked.expect("unreachable")["who"]
        assert sorted(who) == [1, 2]
        assert who[1] == "its process ended"
        assert who[2] == "did not answer within 0.2 s"
        frozen.signal(signal.SIGCONT)
        asked.tell("unreachable")
        assert sorted(asked.expect("unreachable")["who"]) == [1]
