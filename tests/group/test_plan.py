from __future__ import annotations

import pytest
from stretto.group import GroupSettings, Member, Plan


def member(node: str = "", port: int = 10) -> Member:
    return Member("10.0.0.1", port, port + 1, node)


def test_the_environment_counts_ranks_within_nodes_of_unequal_size() -> None:
    members = (member("a"), member("b", 20), member("a"), member("a"))
    environment = Plan(3, 2, members, leader=1).environment()
    assert environment == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_RANK": "2",
        "ROLE_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "20",
    }


def test_a_member_without_a_node_is_a_node_of_its_own() -> None:
    environment = Plan(1, 1, (member(), member())).environment()
    assert (environment["LOCAL_RANK"], environment["GROUP_RANK"], environment["GROUP_WORLD_SIZE"]) == ("0", "1", "2")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((0, 0, (member(),)), "numbered from 1"), ((1, 1, (member(),)), "rank 1"), ((1, 0, (member(),), 2), "leader 2")],
)
def test_an_impossible_plan_is_refused(arguments: tuple[int, int, tuple[Member, ...]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Plan(*arguments)


def test_a_members_address_must_be_numeric_and_its_ports_possible() -> None:
    with pytest.raises(ValueError, match="not 'worker-1'"):
        Member("worker-1", 1, 2)
    with pytest.raises(ValueError, match="preflight_port must be from 1 to 65535, not 0"):
        Member("10.0.0.1", 1, 0)


def test_limits_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="roll_call_s"):
        GroupSettings(roll_call_s=0.0)
