"""Long loops of faults at random moments, with figures. `make soak` runs them, for STRETTO_SOAK_S seconds each."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from group.fleet import Fleet, Process, summary, wait_until_stopped
from group.test_build import POINTS
from stretto.group import GroupSettings

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("STRETTO_SOAK_S", "600"))
SEED = int(os.environ.get("STRETTO_SOAK_SEED", "1"))


class Loop:
    """Rounds with a random world of 2 to 4, some of whom fail; figures of the survivors."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.fleet, self.rng = fleet, rng
        self.released_s: list[float] = []
        self.next_s: list[float] = []
        self.outcomes: Counter[str] = Counter()

    def draw(self) -> tuple[list[Process], list[int]]:
        """Members by rank, and which ranks fail: one, or two of four."""
        while len(self.fleet.processes) < 4:
            self.fleet.add()
        members = self.rng.sample(self.fleet.processes, self.rng.choice((2, 3, 4, 4)))
        count = 2 if len(members) == 4 and self.rng.random() < 0.25 else 1
        return members, self.rng.sample(range(len(members)), count)

    def note(self, answer: dict[str, Any], since_s: float) -> None:
        self.outcomes[answer["event"]] += 1
        self.released_s.append(answer["at_s"] - since_s)

    def go_on(self, survivors: list[Process], since_s: float) -> None:
        self.next_s.append(self.fleet.form(survivors) - since_s)
        self.fleet.leave(survivors)

    def end(self, failed: list[Process], freezes: bool) -> None:
        for process in failed:
            if freezes:
                process.signal(signal.SIGCONT)
                if process.expect("superseded", "failed", "built", "broken")["event"] in ("built", "broken"):
                    self.fleet.leave([process])
            else:
                self.fleet.processes.remove(process)
                process.end()

    def report(self, name: str) -> None:
        figures = self.fleet.figures()
        print(f"\n{name}, seed {SEED}, load {os.getloadavg()[0]:.1f}: {dict(self.outcomes)}")
        print(summary("  fault or news to the training thread released", self.released_s))
        print(summary("  to the next generation's first correct all-reduce", self.next_s))
        for each in figures:
            print(f"  {each['threads']} threads, {each['descriptors']} descriptors, {each['resident_mb']:.0f} MB")
            assert each["firings"] == 0


def repeat(name: str, round_: Callable[[Loop, bool], None], freezes: bool, settings: GroupSettings) -> None:
    rng = random.Random(f"{SEED} {name} {freezes}")
    deadline_s = time.monotonic() + SOAK_S / 4
    with Fleet(4, settings) as fleet:
        loop = Loop(fleet, rng)
        while time.monotonic() < deadline_s:
            round_(loop, freezes)
        loop.report(f"{name}, peers {'frozen' if freezes else 'killed'}")


def fault_inside_init(loop: Loop, freezes: bool) -> None:
    members, victims = loop.draw()
    rng, fleet = loop.rng, loop.fleet
    name = "STOP" if freezes else "KILL"
    point = rng.choice(POINTS[:2] + tuple(f"at_get_{nth + 1}" for nth in range(len(members))))
    survivors = [member for rank, member in enumerate(members) if rank not in victims]
    failed = [members[victim] for victim in victims]
    fleet.begin(members, leader=rng.randrange(len(members)), faults={victims[0]: f"{point}:{name}"})
    if freezes:
        wait_until_stopped(failed[0])
    else:
        failed[0].wait_until_dead()
    since_s = time.monotonic()
    for process in failed[1:]:  # wherever it is by then
        process.signal(signal.SIGSTOP if freezes else signal.SIGKILL)
    if freezes:
        time.sleep(rng.uniform(0.0, 0.1))
        since_s = fleet.supersede(survivors)
    for survivor in survivors:
        answer = survivor.expect("superseded", "failed", "built")
        loop.note(answer, since_s)
        if answer["event"] == "built":
            fleet.leave([survivor])
    loop.go_on(survivors, since_s)
    loop.end(failed, freezes)


def fault_during_all_reduce(loop: Loop, freezes: bool) -> None:
    members, victims = loop.draw()
    rng, fleet = loop.rng, loop.fleet
    survivors = [member for rank, member in enumerate(members) if rank not in victims]
    failed = [members[victim] for victim in victims]
    fleet.form(members)
    numel, in_flight = rng.choice(((1_000, 1), (100_000, 8), (1_000_000, 8)))
    for member in members:
        member.tell("reduce", numel=numel, in_flight=in_flight, rounds=0)
    time.sleep(rng.uniform(0.02, 0.2))
    for process in failed:
        since_s = process.signal(signal.SIGSTOP if freezes else signal.SIGKILL)
    if freezes:
        time.sleep(rng.uniform(0.01, 0.1))
        since_s = time.monotonic()
        for survivor in survivors:
            survivor.cut(fleet.generation, "peers do not answer")
    for survivor in survivors:
        loop.note(survivor.expect("broken"), since_s)
    fleet.leave(survivors)
    loop.go_on(survivors, since_s)
    loop.end(failed, freezes)


@pytest.mark.parametrize("freezes", [True, False])
def test_faults_inside_init(freezes: bool) -> None:
    repeat("faults inside init", fault_inside_init, freezes, GroupSettings())


@pytest.mark.parametrize("freezes", [True, False])
def test_faults_during_all_reduce(freezes: bool) -> None:
    repeat("faults during all-reduce", fault_during_all_reduce, freezes, GroupSettings(operation_timeout_s=10.0))
