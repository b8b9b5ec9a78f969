"""One attempt to form a generation, in stages; after each it asks whether the generation is still wanted.

1. Preflight: every peer's beacon says that it is building this generation too. Keeps dead members out of torch.
2. init_process_group. It blocks inside gloo, so a guard watches over it.
3. Where GPUs use NCCL: the members meet there, in a thread that can be left behind.
No stage asks the leader's store for anything: a client of torch's store that connects to a dead or frozen server tries
again for its whole timeout, and nothing ends that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from stretto.errors import Fatal
from stretto.group import nccl, torch_private
from stretto.group.beacon import Beacon
from stretto.group.failures import BuildFailed, Superseded
from stretto.group.guard import Guard, Verdict
from stretto.group.plan import GroupSettings, Plan
from stretto.group.reaper import Reaper
from stretto.group.sockets import TcpSocket
from stretto.group.store import FormationStore, LeaderStore
from stretto.group.watch import Watch
from stretto.group.watchdog import Watchdog


@dataclass
class Formed:
    """What a build that succeeded hands over. Its last reference must be dropped by the reaper."""

    process_group: dist.ProcessGroup
    store: FormationStore
    watch: Watch
    sockets: list[TcpSocket]
    nccl: Any = None  # NCCL's part of the group, if it has one


class Attempt:
    """Forms one generation, or raises Superseded or BuildFailed and leaves nothing behind but reapers."""

    def __init__(
        self,
        plan: Plan,
        settings: GroupSettings,
        *,
        beacon: Beacon,
        reaper: Reaper,
        watchdog: Watchdog,
        cancelled: Callable[[], bool],
        nccl_device: torch.device | None = None,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._beacon = beacon
        self._reaper = reaper
        self._watchdog = watchdog
        self._cancelled = cancelled
        self._nccl_device = nccl_device
        self._deadline_s = time.monotonic() + settings.formation_limit_s

    def run(self) -> Formed:
        plan = self._plan
        self._beacon.announce(plan.generation)
        ends = {rank: (plan.members[rank].address, plan.members[rank].preflight_port) for rank in plan.peers}
        self._watch = self._beacon.watch(plan.generation, ends)
        try:
            self._preflight()
            return self._init()
        except BaseException:
            self._beacon.announce(-plan.generation)
            self._watch.close()
            raise

    def judge(self) -> Verdict | None:
        """Why this attempt must end now, or None. Called from the building thread and from the guard's."""
        generation = self._plan.generation
        if self._cancelled():
            return Superseded(f"generation {generation} is no longer wanted: a newer assignment exists")
        gone, numbers = self._watch.gone(), self._watch.numbers()
        ahead = [rank for rank, number in numbers.items() if abs(number) > generation]
        if ahead:
            return Superseded(f"rank {ahead[0]} is in generation {abs(numbers[ahead[0]])}, ahead of {generation}")
        if gone:
            return self._failed("members are gone", gone)
        left = [rank for rank, number in numbers.items() if number == -generation]
        if left:
            return self._failed(f"rank {left[0]} gave it up", {})
        if time.monotonic() > self._deadline_s:
            return self._failed(f"not formed within {self._settings.formation_limit_s:g} s", self._missing())
        return None

    def _check(self) -> None:
        verdict = self.judge()
        if verdict is not None:
            raise verdict

    def _preflight(self) -> None:
        settings = self._settings
        awake_s = 0.0  # while this process is held up, no peer is late
        while True:
            self._check()
            numbers = self._watch.numbers()
            if all(numbers.get(rank) == self._plan.generation for rank in self._plan.peers):
                return
            if awake_s > settings.connect_timeout_s and (far := self._watch.unconnected()):
                how = f"no connection within {settings.connect_timeout_s:g} s"
                raise self._failed("members cannot be reached", dict.fromkeys(far, how))
            began_s = time.monotonic()
            self._watch.wait(settings.poll_interval_s)
            awake_s += min(time.monotonic() - began_s, 10 * settings.poll_interval_s)

    def _init(self) -> Formed:
        guard = Guard(self._plan, self._settings, self._watchdog, judge=self.judge)
        publish = partial(self._beacon.publish, self._plan.generation)
        store = FormationStore(self._watch, publish, check=guard.check, leader=self._leader_store())
        backend = torch_private.GLOO if self._nccl_device is None else torch_private.GLOO_AND_NCCL
        try:
            with guard.over(store):
                guard.check()
                torch_private.init_process_group(store, self._plan, self._settings.operation_timeout_s, backend)
                sockets = guard.sockets(store)
            guard.check()  # freed just before it would have succeeded: what came out is not a group
            self._check()
            nccl_part = self._connect_nccl(store)
        except Exception as error:  # torch and gloo raise many kinds; nearly all mean that it did not form
            # No frame that the exceptions keep alive may hold the group: the reaper must be the last to drop it.
            self._reaper.take(torch_private.forget_groups(), [])
            if isinstance(error, Fatal):
                raise
            if isinstance(error, Superseded | BuildFailed):
                verdict: Verdict = error
            else:
                verdict = guard.verdict or self.judge() or self._failed_by_itself(error)
            raise verdict.with_traceback(None) from (None if verdict is error else error.with_traceback(None))
        return Formed(_world(), store, self._watch, sockets, nccl_part)

    def _connect_nccl(self, store: FormationStore) -> Any:
        """Return NCCL's part of the group, once its members have met; None where everything goes over gloo."""
        if self._nccl_device is None:
            return None
        store.check_with(self._check)
        part = torch_private.nccl_of(_world())
        try:
            meeting = nccl.Meeting(part, self._nccl_device, self._plan.world_size)
            while not meeting.wait(self._settings.poll_interval_s):
                self._check()
            self._check()
        except Exception:
            self._reaper.run(partial(nccl.abort, part))
            raise
        return part

    def _leader_store(self) -> LeaderStore:
        leader = self._plan.members[self._plan.leader]
        return LeaderStore(
            (leader.address, leader.store_port),
            f"stretto/{self._plan.generation}",
            connect_timeout_s=self._settings.connect_timeout_s,
            timeout_s=self._settings.operation_timeout_s,
        )

    def _failed_by_itself(self, error: Exception) -> BuildFailed:
        return self._failed(f"{type(error).__name__}: {error}", self._watch.roll_call(self._settings.roll_call_s))

    def _missing(self) -> dict[int, str]:
        """Who kept the generation from forming: not there yet, or frozen."""
        numbers, generation = self._watch.numbers(), self._plan.generation
        late = {
            rank: f"has not begun generation {generation}"
            for rank in self._plan.peers
            if numbers.get(rank) != generation
        }
        return late | self._watch.roll_call(self._settings.roll_call_s)

    def _failed(self, reason: str, who: dict[int, str]) -> BuildFailed:
        told = "".join(f"; rank {rank}: {why}" for rank, why in sorted(who.items()))
        return BuildFailed(f"generation {self._plan.generation}: {reason}{told}", tuple(sorted(who)))


def _world() -> dist.ProcessGroup:
    process_group = dist.group.WORLD
    assert process_group is not None
    return process_group
