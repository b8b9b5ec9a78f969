"""Builds that do not succeed: peers die, freeze, come late or move on while a generation is being formed."""

from __future__ import annotations

import random
import signal
import socket
import time

import pytest
from group.fleet import Fleet, wait_until_stopped
from stretto.group import GroupSettings

pytestmark = pytest.mark.e2e

FREE_LIMIT_S = 4.0  # milliseconds on a quiet machine; the formation limit is 10 s, gloo's own patience 5 x 30 s
# Inside init: before and after our address is published, and after reading the n-th member's.
POINTS = ("before_set", "after_set", "at_get_1", "at_get_2", "at_get_4")


@pytest.mark.parametrize("point", POINTS)
def test_a_member_killed_inside_init_fails_the_build_at_once_and_by_name(point: str) -> None:
    rng = random.Random(point)
    with Fleet(4) as fleet:
        victim = rng.randrange(4)
        members = list(fleet.processes)
        fleet.begin(members, leader=rng.randrange(4), faults={victim: f"{point}:KILL"})
        survivors = [member for rank, member in enumerate(members) if rank != victim]
        for survivor in survivors:
            answer = survivor.expect("failed", "built")
            if answer["event"] == "built":  # the victim was connected to it already
                fleet.leave([survivor])
            else:
                assert answer["at_s"] - answer["began_s"] < FREE_LIMIT_S
                assert answer["unreachable"] in ((victim,), ())  # (): another survivor gave up first, and said so
        fleet.form(survivors)


@pytest.mark.parametrize("point", POINTS)
def test_a_member_frozen_inside_init_holds_nobody_once_a_newer_assignment_exists(point: str) -> None:
    rng = random.Random(point)
    with Fleet(4) as fleet:
        for _ in range(2):
            victim = rng.randrange(4)
            members = list(fleet.processes)
            survivors = [member for rank, member in enumerate(members) if rank != victim]
            fleet.begin(members, leader=rng.randrange(4), faults={victim: f"{point}:STOP"})
            wait_until_stopped(members[victim])
            time.sleep(rng.uniform(0.0, 0.1))
            said_s = fleet.supersede(survivors)
            for survivor in survivors:
                answer = survivor.expect("superseded", "built")
                assert answer["at_s"] - said_s < FREE_LIMIT_S
                if answer["event"] == "built":
                    fleet.leave([survivor])
            fleet.form(survivors)
            fleet.leave(survivors)
            members[victim].signal(signal.SIGCONT)  # thawed, it learns that the others are ahead, and may come back
            if members[victim].expect("superseded", "failed", "built")["event"] == "built":
                fleet.leave([members[victim]])
            fleet.form(members)
            fleet.leave(members)
        assert [each["firings"] for each in fleet.figures()] == [0, 0, 0, 0]


def test_a_frozen_leader_is_like_any_other_frozen_member() -> None:
    """A client of torch's store would try again for its whole timeout."""
    with Fleet(3) as fleet:
        leader, *others = fleet.processes
        fleet.begin(fleet.processes, leader=0, faults={0: "before_set:STOP"})
        wait_until_stopped(leader)
        said_s = fleet.supersede(others)
        for other in others:
            assert other.expect("superseded")["at_s"] - said_s < FREE_LIMIT_S
        fleet.form(others)


def test_two_of_four_die_at_different_points_of_one_build() -> None:
    with Fleet(4) as fleet:
        survivors = [fleet.processes[0], fleet.processes[2]]
        fleet.begin(fleet.processes, leader=1, faults={1: "after_set:KILL", 3: "at_get_2:KILL"})
        for survivor in survivors:
            answer = survivor.expect("failed", "built")
            if answer["event"] == "built":  # its connections were there before the members died
                survivor.tell("operation", name="barrier")
                answer = survivor.expect("broken")
                fleet.leave([survivor])
            assert set(answer["unreachable"]) <= {1, 3}
        fleet.form(survivors)


def test_the_formation_limit_names_the_frozen_member() -> None:
    with Fleet(3, GroupSettings(formation_limit_s=0.7)) as fleet:
        fleet.begin(fleet.processes, faults={1: "before_set:STOP"})
        answers = [fleet.processes[rank].expect("failed") for rank in (0, 2)]
        assert any(answer["unreachable"] == (1,) for answer in answers), answers
        assert all(answer["unreachable"] in ((1,), ()) for answer in answers), answers
        assert all(answer["at_s"] - answer["began_s"] < FREE_LIMIT_S for answer in answers)


def test_the_formation_limit_names_a_member_that_never_began() -> None:
    with Fleet(3, GroupSettings(formation_limit_s=0.5)) as fleet:
        first, second, absent = fleet.processes
        for rank, member in enumerate((first, second)):
            ports = [process.ports for process in fleet.processes]
            member.tell("build", generation=1, rank=rank, members=ports, leader=0, fault="")
        answers = [member.expect("failed") for member in (first, second)]
        assert any(answer["unreachable"] == (2,) for answer in answers), answers
        assert any("has not begun generation 1" in answer["reason"] for answer in answers), answers
        absent.tell("exit", timeout_s=5.0)
        assert absent.expect("exited")["clean"]


def test_a_member_out_of_reach_fails_the_build_long_before_the_formation_limit() -> None:
    """Its packets vanish, as behind a broken network: here, because a queue of connections is full."""
    with Fleet(1, GroupSettings(formation_limit_s=600.0, connect_timeout_s=0.3)) as fleet, socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        (member,) = fleet.processes
        ports = [member.ports, (1, full.getsockname()[1])]
        member.tell("build", generation=1, rank=0, members=ports, leader=0, fault="")
        answer = member.expect("failed")
        assert answer["unreachable"] == (1,)
        assert "no connection within 0.3 s" in answer["reason"]
        for sock in waiting:
            sock.close()


def test_a_member_that_is_dead_before_the_build_never_reaches_torch() -> None:
    with Fleet(3) as fleet:
        fleet.processes[2].kill()
        ports = [process.ports for process in fleet.processes]
        for rank, member in enumerate(fleet.processes[:2]):
            member.tell("build", generation=1, rank=rank, members=ports, leader=0, fault="")
        for member in fleet.processes[:2]:
            answer = member.expect("failed")
            assert answer["unreachable"] in ((2,), ())
            assert answer["at_s"] - answer["began_s"] < FREE_LIMIT_S


def test_a_stale_member_learns_from_the_others_that_it_is_behind() -> None:
    with Fleet(3) as fleet:
        stale, *others = fleet.processes
        fleet.generation = 6
        fleet.form(others)
        ports = [process.ports for process in fleet.processes]
        stale.tell("build", generation=6, rank=0, members=ports, leader=0, fault="")
        assert "ahead of 6" in stale.expect("superseded")["reason"]
        fleet.leave(others)
        fleet.form(fleet.processes)
