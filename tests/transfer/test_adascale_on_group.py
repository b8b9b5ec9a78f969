"""AdaScale and DDP on groups whose members are killed in the middle of a step, against one undisturbed process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from group.fleet import Entry, Fleet, Process
from rank_scenarios import Scenario, Sizes, expect
from stretto.group import GroupSettings
from transfer.trainee import main

pytestmark = pytest.mark.e2e

EQUAL: Sizes = ((4,), (4,), (4,))
UNEQUAL: Sizes = ((3,), (9,), (2,))
TWICE: Sizes = ((4, 4), (4, 4), (4, 4))
UNEQUAL_TWICE: Sizes = ((3, 1), (2, 6), (9, 5))

CASES: dict[str, tuple[str, Sizes, dict[str, Any]]] = {
    "forward": ("forward", EQUAL, {}),
    "backward": ("backward", EQUAL, {}),
    "step": ("step", EQUAL, {}),
    "count_under_way": ("count", UNEQUAL, {"announce": "count"}),
    "backward_of_a_known_total": ("backward", UNEQUAL, {"announce": "total"}),
    "first_micro_batch": ("backward:1", TWICE, {"accumulation": 2}),
    "second_micro_batch": ("backward:2", UNEQUAL_TWICE, {"accumulation": 2, "announce": "total"}),
    "each_micro_batch_synchronised": ("backward:2", TWICE, {"accumulation": 2, "no_sync": False}),
}


def run_generation(
    fleet: Fleet, members: list[Process], scenario: Scenario, steps: tuple[int, int], dies: str
) -> list[dict[str, Any]]:
    """Take steps [first, stop) on these members; with `dies`, the first of them is killed in the last step."""
    first, stop = steps
    fleet.form(members)
    for rank, member in enumerate(members):
        doomed = dies and rank == 0
        member.tell("adascale", scenario=scenario, first=first, stop=stop, dies=dies if doomed else "")
    if dies:
        members[0].wait_until_dead()
        replies = [member.expect("broken") for member in members[1:]]
        for reply in replies:
            reply["steps"] = reply["steps"][: stop - 1 - first]
    else:
        replies = [member.expect("stepped") for member in members]
    fleet.leave(members[1:] if dies else members)
    for reply in replies:
        assert (reply["freed"], reply["gradients"]) == (True, 0)
        # A collective that torch was asked for directly would not be released by a cut.
        assert reply["collectives"]["ours"] == reply["collectives"]["all"]
        assert reply["collectives"]["ours"] > 0 or len(members) == 1
    return replies


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_was_cut_off_is_taken_anew_as_if_nothing_had_been(case: str) -> None:
    """Three ranks, one dies; two, one dies; then one alone, without DDP."""
    check_case(case, [main] * 3)


def check_case(case: str, entries: Sequence[Entry]) -> None:
    """entries: what each of the three processes runs."""
    dies, sizes, options = CASES[case]

    def scenario(*ranks_by_step: int) -> Scenario:
        return Scenario(tuple(sizes[:ranks] for ranks in ranks_by_step), **options)

    with Fleet(0, GroupSettings(operation_timeout_s=20.0)) as fleet:
        for entry in entries:
            fleet.add(entry)
        members = list(fleet.processes)
        for member in members:
            member.tell("begin_adascale", accumulation=options.get("accumulation", 1), base=4)
            member.expect("begun")
        replies = [run_generation(fleet, members, scenario(3, 3, 3), (0, 3), dies)]
        replies.append(run_generation(fleet, members[1:], scenario(3, 3, 2, 2, 2), (2, 5), dies))
        replies.append(run_generation(fleet, members[2:], scenario(3, 3, 2, 2, 1, 1), (4, 6), ""))

    expected = expect(scenario(3, 3, 2, 2, 1, 1))
    first = [step for generation in replies for step in generation[0]["steps"]]
    assert max(expected.gains) > 1.01
    gains, taus, scales, parameters = zip(*first, strict=True)
    assert gains == pytest.approx(expected.gains, rel=1e-9)
    assert taus == pytest.approx(expected.taus, rel=1e-9)
    assert scales == pytest.approx(expected.scales)
    np.testing.assert_allclose(parameters, expected.parameters, rtol=1e-9)
    for generation in replies:
        assert all(reply["steps"] == generation[0]["steps"] for reply in generation), "survivors differ"
