"""Groups whose operations end on a GPU alone, between real processes; gloo stands in for NCCL (nccl_stand_in.py)."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence

import pytest
from group.fleet import Fleet, Process
from group.nccl_stand_in import main
from stretto.group import GroupSettings

pytestmark = pytest.mark.e2e

RELEASE_LIMIT_S = 4.0  # milliseconds on a quiet machine; without the cut it is the operations' timeout of 20 s
SETTINGS = GroupSettings(operation_timeout_s=20.0)


def fleet_of(size: int, settings: GroupSettings = SETTINGS) -> Fleet:
    return Fleet(size, settings, entry=main)


def work(members: Sequence[Process], *, for_s: float) -> None:
    for member in members:
        member.tell("reduce", numel=200_000, in_flight=4, rounds=0)
    time.sleep(for_s)


def released(survivors: Sequence[Process], since_s: float) -> None:
    for survivor in survivors:
        assert survivor.expect("broken")["released_s"] - since_s < RELEASE_LIMIT_S


def test_results_come_when_the_gpu_has_them_and_each_generation_aborts_its_own_part() -> None:
    with fleet_of(3) as fleet:
        for _ in range(3):
            fleet.form(fleet.processes)
            for process in fleet.processes:
                process.tell("train", steps=3, width=64, layers=3)
            assert [process.expect("trained")["done"] for process in fleet.processes] == [3, 3, 3]
            fleet.leave(fleet.processes)
        figures = fleet.figures()
        for _ in range(4):
            fleet.form(fleet.processes)
            fleet.leave(fleet.processes)
        for process, before, after in zip(fleet.processes, figures, fleet.figures(), strict=True):
            assert after["threads"] < before["threads"] + 4  # the newest generation's may be about to end
            assert after["firings"] == 0
            process.tell("aborts")
            assert process.expect("aborts")["count"] == 7


def test_a_killed_peer_releases_those_who_wait_for_the_gpu() -> None:
    rng = random.Random(7)
    with fleet_of(3) as fleet:
        for _ in range(3):
            members = rng.sample(fleet.processes, 3)
            fleet.form(members)
            work(members, for_s=rng.uniform(0.05, 0.3))
            killed_s = members[0].kill()
            fleet.processes.remove(members[0])
            released(members[1:], killed_s)
            fleet.leave(members[1:])
            fleet.form(members[1:])
            fleet.leave(members[1:])
            fleet.add()


def test_a_frozen_peer_is_cut_off_and_refused_when_it_thaws() -> None:
    with fleet_of(3) as fleet:
        fleet.form(fleet.processes)
        frozen, *survivors = fleet.processes
        work(fleet.processes, for_s=0.2)
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
        assert [each["firings"] for each in fleet.figures()] == [0, 0, 0]


def test_who_leaves_releases_those_whose_operation_has_no_socket() -> None:
    with fleet_of(2) as fleet:
        fleet.form(fleet.processes)
        leaving, waiting = fleet.processes
        waiting.tell("operation", name="all_reduce")
        fleet.leave([leaving])
        assert waiting.expect("broken")["reason"] == "generation 1: a collective failed: rank 0 has left the generation"
        fleet.leave([waiting])
        fleet.form(fleet.processes)


def test_a_member_killed_while_nccls_members_meet_fails_the_build_by_name() -> None:
    with fleet_of(3) as fleet:
        victim, *survivors = fleet.processes
        victim.tell("die_in_meeting")
        victim.expect("done")
        fleet.begin(fleet.processes)
        for survivor in survivors:
            answer = survivor.expect("failed")
            assert answer["at_s"] - answer["began_s"] < RELEASE_LIMIT_S
            assert answer["unreachable"] in ((0,), ())  # (): the other survivor gave up first, and said so
        fleet.form(survivors)
        for survivor in survivors:
            survivor.tell("abandon")
            survivor.expect("abandoned")
            survivor.tell("aborts")
            assert survivor.expect("aborts")["count"] == 2
