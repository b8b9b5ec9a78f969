"""Faults of three controllers, of three members of etcd and of the network between all, while a job trains."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from harness.controller import ControllerProcess
from harness.etcd import EtcdCluster
from harness.live_job import LiveJob
from harness.network import Network

CONTROLLERS = [f"control{number}" for number in range(3)]
MEMBERS = [f"etcd{number}" for number in range(3)]
NODES = [f"n{number}" for number in range(4)]
PEOPLE = "people"
_LEADER_KEY = "/stretto/leader"


class ClusterChaos:
    """Who runs, what is broken at the moment, and when each thing heals. The same seed draws the same faults."""

    def __init__(
        self,
        seed: int,
        controllers: list[ControllerProcess],
        etcd: EtcdCluster,
        job: LiveJob,
        network: Network | None,
    ) -> None:
        self.rng = random.Random(seed)
        self.controllers, self.etcd, self.job, self.network = controllers, etcd, job, network
        self.counts: Counter[str] = Counter()
        # When the controller that led was taken away, by wall-clock time.
        self.leaders_lost_s: list[float] = []
        self._heals: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._frozen: set[int] = set()
        self._members_away: set[int] = set()
        self._cut = False

    def once(self) -> str:
        """One fault, drawn from those that are possible now; its name."""
        faults = [self.leader_dies, self.leader_dies, self.leader_freezes, self.leader_freezes, self.controller_dies]
        faults += [self.compaction, self.worker_dies, self.worker_dies, self.worker_dies]
        if not self._members_away:
            faults += [self.member_dies, self.etcd_leader_dies, self.member_freezes, self.etcd_leader_freezes]
            faults += [self.etcd_restarts]
        if self.network is not None and not self._cut:
            faults += [self.leader_cut_from_etcd] * 2 + [self.leader_cut_from_clients, self.leader_cut_from_all]
        fault = self.rng.choice(faults)
        name = fault.__name__.replace("_", " ")
        if fault() is False:
            return ""
        self.counts[name] += 1
        return name

    def heal_what_is_due(self) -> None:
        while self._heals and self._heals[0][0] <= time.monotonic():
            heapq.heappop(self._heals)[2]()

    def heal(self) -> None:
        """Everything at once."""
        while self._heals:
            heapq.heappop(self._heals)[2]()

    def _later(self, least_s: float, most_s: float, call: Callable[[], None]) -> None:
        due_s = time.monotonic() + self.rng.uniform(least_s, most_s)
        heapq.heappush(self._heals, (due_s, next(self._order), call))

    # -- controllers

    def leader(self) -> int | None:
        """Which controller has the leader's key."""
        with suppress(OSError, ValueError, KeyError, StopIteration):
            value = json.loads(self.etcd.get(_LEADER_KEY) or "{}")
            return [controller.grpc for controller in self.controllers].index(value["grpc"])
        return None

    def _leader_that_runs(self) -> int | None:
        number = self.leader()
        if number is None or number in self._frozen or not self.controllers[number].alive():
            return None
        self.leaders_lost_s.append(time.time())
        return number

    def leader_dies(self) -> bool:
        number = self._leader_that_runs()
        return number is not None and self._kill(number)

    def controller_dies(self) -> bool:
        return self._kill(self.rng.randrange(len(self.controllers)))

    def _kill(self, number: int) -> bool:
        controller = self.controllers[number]
        if number in self._frozen or not controller.alive():
            return False
        controller.kill()
        self._later(0.5, 4.0, controller.launch)
        return True

    def leader_freezes(self) -> bool:
        number = self._leader_that_runs()
        if number is None:
            return False
        self.controllers[number].signal(signal.SIGSTOP)
        self._frozen.add(number)
        self._later(0.5, 7.0, lambda: self._thaw(number))
        return True

    def _thaw(self, number: int) -> None:
        self._frozen.discard(number)
        self.controllers[number].signal(signal.SIGCONT)

    # -- the network

    def leader_cut_from_etcd(self) -> bool:
        return self._cut_leader(MEMBERS)

    def leader_cut_from_clients(self) -> bool:
        return self._cut_leader([*NODES, PEOPLE])

    def leader_cut_from_all(self) -> bool:
        return self._cut_leader([*MEMBERS, *NODES, PEOPLE])

    def _cut_leader(self, others: list[str]) -> bool:
        assert self.network is not None
        number = self._leader_that_runs()
        if number is None:
            return False
        self._cut = True
        self.network.cut([CONTROLLERS[number]], others)
        self._later(1.0, 8.0, self._reconnect)
        return True

    def _reconnect(self) -> None:
        assert self.network is not None
        self._cut = False
        self.network.heal()

    # -- etcd

    def member_dies(self) -> bool:
        return self._kill_member(self.rng.randrange(len(MEMBERS)))

    def etcd_leader_dies(self) -> bool:
        return self._kill_member(self.etcd.leader())

    def _kill_member(self, member: int) -> bool:
        self.etcd.kill(member)
        self._members_away.add(member)
        self._later(0.5, 4.0, lambda: self._start_member(member))
        return True

    def _start_member(self, member: int) -> None:
        self._members_away.discard(member)
        self.etcd.start(member)

    def member_freezes(self) -> bool:
        return self._freeze_member(self.rng.randrange(len(MEMBERS)))

    def etcd_leader_freezes(self) -> bool:
        return self._freeze_member(self.etcd.leader())

    def _freeze_member(self, member: int) -> bool:
        self.etcd.freeze(member)
        self._members_away.add(member)
        self._later(0.5, 6.0, lambda: self._thaw_member(member))
        return True

    def _thaw_member(self, member: int) -> None:
        self._members_away.discard(member)
        self.etcd.thaw(member)

    def etcd_restarts(self) -> bool:
        """All of it, one member after the other, for a moment."""
        for member in range(len(MEMBERS)):
            self._kill_member(member)
        return True

    def compaction(self) -> bool:
        with suppress(OSError):
            self.etcd.compact()
            return True
        return False

    # -- the job

    def worker_dies(self) -> bool:
        """So that generations change."""
        rows = self.job.agents.rows()
        if not rows:
            return False
        pids = self.job.agents.worker_pids(self.rng.choice(rows[-20:]).node)
        if len(pids) != 1:
            return False
        with suppress(ProcessLookupError):
            os.kill(pids[0], signal.SIGKILL)
        return True


def leads_after_s(lost_s: list[float], controllers: list[ControllerProcess]) -> list[float]:
    """For each moment at which a leader was taken away: how long until some controller's log says that it leads."""
    began_s = sorted(
        datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
        for controller in controllers
        for line in controller.log.splitlines()
        if line.endswith("this controller leads")
    )
    found = []
    for moment_s, next_s in itertools.pairwise([*lost_s, math.inf]):
        found += [since_s - moment_s for since_s in began_s if moment_s < since_s < next_s][:1]
    return found
