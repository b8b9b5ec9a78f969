"""State that travels between real processes: what arrives, and what is left when a rank dies, lies or refuses."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from group.fleet import Fleet, Process
from stretto.group import GroupSettings
from transfer.trainee import main

pytestmark = pytest.mark.e2e

MEGABYTES = 60


def fleet_of(size: int) -> Fleet:
    return Fleet(size, GroupSettings(operation_timeout_s=20.0), entry=main)


def tell_all(members: Iterable[Process], do: str, **facts: Any) -> None:
    for member in members:
        member.tell(do, **facts)


def answers(members: Iterable[Process], *events: str) -> list[dict[str, Any]]:
    return [member.expect(*events) for member in members]


def hold_large(members: list[Process]) -> list[int]:
    for index, member in enumerate(members):
        member.tell("hold_large", seed=index, megabytes=MEGABYTES)
    return [answer["print"] for answer in answers(members, "held")]


def assert_untouched(replies: list[dict[str, Any]]) -> None:
    assert all(reply["untouched"] for reply in replies), replies


@pytest.mark.parametrize("chunk_bytes", [65_544, 1_000_000, 32 << 20])
def test_every_rank_ends_with_the_bits_of_any_source(chunk_bytes: int) -> None:
    with fleet_of(3) as fleet:
        fleet.form(fleet.processes)
        for source in range(3):
            for rank, member in enumerate(fleet.processes):
                member.tell("hold_mixed", seed=rank)
            prints = [answer["print"] for answer in answers(fleet.processes, "held")]
            assert len(set(prints)) == 3
            tell_all(fleet.processes, "synchronise", source=source, chunk_bytes=chunk_bytes, in_flight=2)
            replies = answers(fleet.processes, "synchronised")
            assert_untouched(replies)
            assert [reply["print"] for reply in replies] == [prints[source]] * 3
            receivers = [member for rank, member in enumerate(fleet.processes) if rank != source]
            tell_all(receivers, "compare_mixed", seed=source)
            for reply in answers(receivers, "compared"):
                strides = {"turned": True, "channels_last": True}
                assert (reply["same"], reply["tied"], reply["own_memory"], reply["strides"]) == (
                    True,
                    True,
                    True,
                    strides,
                )


def test_a_joiner_and_a_laggard_go_on_with_the_state_of_the_most_advanced() -> None:
    """The joiner's optimizer has no momentum yet; the laggard's was set up with other options."""
    with fleet_of(3) as fleet:
        for member, (seed, steps, momentum) in zip(
            fleet.processes, [(1, 0, 0.9), (2, 4, 0.9), (3, 2, 0.5)], strict=True
        ):
            member.tell("hold_objects", seed=seed, steps=steps, momentum=momentum)
        prints = [answer["print"] for answer in answers(fleet.processes, "held")]
        fleet.form(fleet.processes)
        tell_all(fleet.processes, "synchronise", source=1)
        assert_untouched(answers(fleet.processes, "synchronised"))
        tell_all(fleet.processes, "load")
        for reply in answers(fleet.processes, "loaded"):
            assert reply["kept"]
            assert reply["print"] == prints[1]
            assert reply["tau"] > 0
        fleet.leave(fleet.processes)
        tell_all(fleet.processes, "train_alone", steps=4)
        assert len({answer["print"] for answer in answers(fleet.processes, "trained")}) == 1


@pytest.mark.parametrize("victim", ["source", "receiver"])
def test_a_rank_that_is_killed_while_state_travels_leaves_every_other_as_it_was(victim: str) -> None:
    seed = random.randrange(1_000_000)
    rng = random.Random(seed)
    print("seed", seed)
    with fleet_of(3) as fleet:
        prints = hold_large(fleet.processes)
        for _ in range(2):
            while len(fleet.processes) < 3:
                fleet.add()
            prints = hold_large(fleet.processes)
            fleet.form(fleet.processes)
            source = rng.randrange(3)
            doomed = source if victim == "source" else rng.choice([rank for rank in range(3) if rank != source])
            # The first broadcast is of the manifest; then 60 MB in messages of 1 MB.
            moment = rng.randrange(1, MEGABYTES // 2)
            for rank, member in enumerate(fleet.processes):
                fault = f"kill:{moment}" if rank == doomed else ""
                member.tell("synchronise", source=source, fault=fault, chunk_bytes=1_000_000)
            fleet.processes[doomed].wait_until_dead()
            dead = fleet.processes.pop(doomed)
            prints.pop(doomed)
            assert_untouched(answers(fleet.processes, "broken"))
            dead.end()
            fleet.leave(fleet.processes)
            fleet.form(fleet.processes)
            tell_all(fleet.processes, "synchronise", source=1)
            replies = answers(fleet.processes, "synchronised")
            assert [reply["print"] for reply in replies] == [prints[1]] * 2
            fleet.leave(fleet.processes)


def test_a_cut_releases_those_who_wait_for_a_source_that_says_nothing() -> None:
    with fleet_of(2) as fleet:
        fleet.form(fleet.processes)
        tell_all(fleet.processes, "hold_mixed", seed=1)
        answers(fleet.processes, "held")
        waiting = fleet.processes[1]
        waiting.tell("synchronise", source=0)
        waiting.cut(fleet.generation, "the test says so")
        assert_untouched(answers([waiting], "broken"))


def test_a_byte_that_changes_on_its_way_is_noticed_by_all_and_nobody_swaps() -> None:
    with fleet_of(3) as fleet:
        prints = hold_large(fleet.processes)
        fleet.form(fleet.processes)
        for rank, member in enumerate(fleet.processes):
            member.tell("synchronise", source=0, fault="flip:9" if rank == 2 else "", chunk_bytes=1_000_000)
        replies = answers(fleet.processes, "failed_transfer")
        assert_untouched(replies)
        assert {reply["ranks"] for reply in replies} == {(2,)}
        assert all("rank 2 received differs from what rank 0 sent" in reply["reason"] for reply in replies)
        tell_all(fleet.processes, "synchronise", source=0)  # the group works on
        assert {reply["print"] for reply in answers(fleet.processes, "synchronised")} == {prints[0]}


def test_who_cannot_give_or_will_not_take_says_why_and_the_others_who_it_is() -> None:
    with fleet_of(3) as fleet:
        fleet.form(fleet.processes)
        first, *others = fleet.processes
        first.tell("hold_unsendable")
        tell_all(others, "hold_mixed", seed=1)
        answers(fleet.processes, "held")

        tell_all(fleet.processes, "synchronise", source=0)
        assert "state['scheduler']['function'] is a function" in first.expect("refused")["reason"]
        for reply in answers(others, "failed_transfer"):
            assert (reply["ranks"], reply["reason"][:6]) == ((0,), "rank 0")

        for rank, member in enumerate(fleet.processes):
            member.tell("synchronise", source=1, **({"max_manifest_bytes": 100} if rank == 2 else {}))
        assert "TransferSettings.max_manifest_bytes" in fleet.processes[2].expect("refused")["reason"]
        for reply in answers(fleet.processes[:2], "failed_transfer"):
            assert (reply["ranks"], reply["reason"][:14]) == ((2,), "rank 2 refused")

        for rank, member in enumerate(fleet.processes):
            member.tell("synchronise", source=2 if rank == 2 else 1)
        replies = answers(fleet.processes, "failed_transfer")
        assert [reply["ranks"] for reply in replies] == [(2,), (2,), (0, 1)]

        tell_all(fleet.processes, "synchronise", source=1)
        answers(fleet.processes, "synchronised")
