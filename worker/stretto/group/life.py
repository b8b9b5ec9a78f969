"""The process's side of every generation it lives through: what it serves, what it builds, what it leaves behind."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stretto.group import nccl, torch_private
from stretto.group.beacon import Beacon
from stretto.group.build import Attempt
from stretto.group.live import Group
from stretto.group.plan import GroupSettings, Plan
from stretto.group.reaper import Reaper
from stretto.group.store import ServedStore
from stretto.group.watchdog import Watchdog


@dataclass(frozen=True)
class Ports:
    """Where this process listens; the controller hands them to the other members."""

    store: int
    preflight: int


class GroupLife:
    """Builds one generation's group after another in this process. Create one, once; the training thread calls it.

    `job` keeps workers of different jobs apart that meet on a port by mistake. `address` is the numeric address that
    peers reach us at; nothing listens anywhere else. `nccl_device`: this process's own GPU, whose tensors go over
    NCCL, on all members alike; without it everything goes over gloo, CUDA tensors by way of the host.
    """

    def __init__(
        self,
        job: str,
        address: str,
        *,
        settings: GroupSettings | None = None,
        on_stuck: Callable[[str], None] | None = None,
        nccl_device: torch.device | None = None,
    ) -> None:
        self._job = job
        self._address = address
        self._settings = settings or GroupSettings()
        self._nccl_device = nccl_device
        if nccl_device is not None:
            nccl.prepare(nccl_device, self._settings)
        self._reaper = Reaper()
        self._watchdog = Watchdog(self._settings.stuck_limit_s, on_stuck)
        self._served: tuple[ServedStore, Beacon] | None = None
        self._lock = threading.Lock()  # guards the two fields below, between the training thread and whoever cuts
        self._group: Group | None = None
        self._cut: tuple[int, str] = (0, "")  # generations up to this one are over, and why
        atexit.register(self.close, self._settings.stuck_limit_s)

    @property
    def watchdog_firings(self) -> int:
        """How often a section was stuck; without `on_stuck` of your own the process ends at the first."""
        return self._watchdog.firings

    def serve(self) -> Ports:
        """Start this process's store and beacon, once; a later call returns the same ports."""
        if self._served is None:
            torch_private.prefer_interface_of(self._address)
            store = ServedStore(self._address, self._settings.operation_timeout_s)
            self._served = (store, Beacon(self._job, self._address))
        store, beacon = self._served
        return Ports(store=store.port, preflight=beacon.port)

    def build(self, plan: Plan, *, cancelled: Callable[[], bool]) -> Group:
        """Form this generation with its other members and return its group, within `formation_limit_s`.

        `cancelled` says that a newer assignment exists; it is called often, also from another thread, and must
        neither block nor raise. Raises Superseded or BuildFailed; the generation is then over for this process, and
        the other members learn of it at once.
        """
        if self._group is not None:
            raise RuntimeError(
                f"generation {self._group.generation} is still held: abandon() it before building {plan.generation}"
            )
        if dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is initialized already: with in-process reconfiguration the process group is made "
                "for you, so remove the script's own init_process_group"
            )
        self.serve()
        assert self._served is not None
        beacon = self._served[1]
        os.environ.update(plan.environment())
        attempt = Attempt(
            plan,
            self._settings,
            beacon=beacon,
            reaper=self._reaper,
            watchdog=self._watchdog,
            cancelled=lambda: self._cut[0] >= plan.generation or cancelled(),
            nccl_device=self._nccl_device,
        )
        formed = attempt.run()

        def on_over() -> None:
            with self._lock:
                self._group = None
            beacon.announce(-plan.generation)

        group = Group(
            plan,
            formed,
            self._settings,
            reaper=self._reaper,
            watchdog=self._watchdog,
            on_over=on_over,
            nccl_device=self._nccl_device,
        )
        with self._lock:
            self._group = group
            cut_generation, reason = self._cut
        if cut_generation >= plan.generation:  # said while the group was being made
            group.cut(reason)
        return group

    def cut(self, generation: int, reason: str) -> None:
        """End this generation and all before it, from any thread: the group that is held, or the build under way.

        For news that may come before `build` has returned or was called; Group.cut is for whoever holds the group.
        """
        with self._lock:
            if generation > self._cut[0]:
                self._cut = (generation, reason)
            group = self._group
        if group is not None and group.generation <= generation:
            group.cut(reason)

    def close(self, timeout_s: float) -> bool:
        """Leave the generation, stop serving; whether everything of torch was destroyed within `timeout_s`.

        If not, an operation is stuck until its own timeout: end the process with os._exit, since torch aborts a
        process that ends in the usual way while a group is being destroyed. Called at exit at the latest.
        """
        if self._group is not None:
            self._group.abandon()
        finished = self._reaper.wait(timeout_s)
        if self._served is not None:
            self._served[1].close()
            self._served = None
        atexit.unregister(self.close)
        return finished
