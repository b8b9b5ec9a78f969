"""Planned changes: everyone leaves after the same step, and the next generation forms in the same processes."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from group.fleet import Fleet, Process, summary

pytestmark = pytest.mark.e2e


def train(members: list[Process]) -> None:
    """Two DDP steps of these members, together."""
    for member in members:
        member.tell("train", steps=2, width=64, layers=3)
    for member in members:
        member.expect("trained")


def settled(fleet: Fleet, like: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The members' figures, once what still ends in the background has ended: as before, or after 5 s."""
    deadline_s = time.monotonic() + 5.0
    while True:
        figures = fleet.figures()
        keys = ("threads", "descriptors")
        same = like is not None and all(a[k] <= b[k] for a, b in zip(figures, like, strict=True) for k in keys)
        if same or like is None or time.monotonic() > deadline_s:
            return figures
        time.sleep(0.1)


def test_sixty_changes_of_membership_leave_no_thread_no_descriptor_and_little_memory_behind() -> None:
    rng = random.Random(7)
    spent_s = []
    with Fleet(4) as fleet:
        # What torch makes once in a process, some of it only when it first trains, is there before anything is counted.
        fleet.form(fleet.processes)
        train(fleet.processes)
        fleet.leave(fleet.processes)
        before = settled(fleet)
        for change in range(60):
            members = rng.sample(fleet.processes, rng.randint(2, 4))
            began_s = time.monotonic()
            spent_s.append(fleet.form(members, leader=rng.randrange(len(members))) - began_s)
            if change % 6 == 0:
                train(members)
            fleet.leave(members)
        after = settled(fleet, like=before)
        for first, last in zip(before, after, strict=True):
            # At most one more: torch may start a thread of its own late. Sixty changes that leak would leave sixty.
            assert last["threads"] <= first["threads"] + 1
            assert last["descriptors"] <= first["descriptors"] + 1
            assert last["resident_mb"] < first["resident_mb"] + 30
            assert last["firings"] == 0
    print(summary("assignment to the first correct all-reduce", spent_s))


def test_everyone_sees_the_last_all_reduce_even_when_others_leave_at_once() -> None:
    with Fleet(3) as fleet:
        for _ in range(20):
            fleet.form(fleet.processes)
            for process in fleet.processes:  # jobs queue up: each leaves the moment its own last one is done
                process.tell("reduce", numel=300_000, in_flight=4, rounds=2)
                process.tell("abandon")
            for process in fleet.processes:
                assert process.expect("reduced", "broken")["event"] == "reduced"
                process.expect("abandoned")


def test_a_group_of_one_works() -> None:
    with Fleet(1) as fleet:
        fleet.form(fleet.processes)
        fleet.leave(fleet.processes)


def test_the_environment_follows_the_generation() -> None:
    with Fleet(3) as fleet:
        fleet.form(fleet.processes)
        assert [each["environment"]["RANK"] for each in fleet.figures()] == ["0", "1", "2"]
        fleet.leave(fleet.processes)
        changed = [fleet.processes[2], fleet.processes[0]]
        fleet.form(changed, leader=1)
        figures = fleet.figures()
        assert figures[2]["environment"] == {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_PORT": str(fleet.processes[0].ports[0]),
        }
        assert figures[0]["environment"]["RANK"] == "1"
        assert figures[2]["excepthook"] == "excepthook"  # not a chain of torch's, one for each generation


def test_new_group_of_a_script_works_through_the_leaders_store() -> None:
    with Fleet(3) as fleet:
        fleet.form(fleet.processes, leader=1)
        for process in fleet.processes:
            process.tell("subgroup")
        for process in fleet.processes:
            assert process.expect("done")["total"] == 6.0
        fleet.leave(fleet.processes)
        fleet.form(fleet.processes)
