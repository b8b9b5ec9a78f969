"""The learning-rate schedule that AdaScale reads at floor(tau): a torch scheduler, or a function of tau."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

LrAt = Callable[[int], float | Sequence[float]]


class Schedule:
    """Keeps the groups' base rates where the user's schedule has them at floor(tau).

    `scheduler`: a torch scheduler, stepped once per integer that tau crosses; or `lr_at(tau)`, which is called with
    whole numbers and returns the rate of all groups, or one rate per group; or None, for rates that stay.
    """

    def __init__(self, scheduler: LRScheduler | LrAt | None, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._scheduler: LRScheduler | None = None
        self._lr_at: LrAt | None = None
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau follows a metric, not tau; step it yourself and pass no scheduler")
        if isinstance(scheduler, LRScheduler):
            if scheduler.optimizer.param_groups is not optimizer.param_groups:  # a wrapper of it would do
                raise ValueError("scheduler belongs to another optimizer; make it with the optimizer given to AdaScale")
            self._scheduler = scheduler
        elif callable(scheduler):
            self._lr_at = scheduler
            self._set(0)
        elif scheduler is not None:
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__}; allowed: a torch LRScheduler, or a function of tau that "
                "returns a learning rate"
            )

    def advance(self, before: float, after: float) -> None:
        """Move from floor(before) to floor(after), one step for each integer between them."""
        first, last = math.floor(before), math.floor(after)
        if self._lr_at is not None and last > first:
            self._set(last)
        if self._scheduler is not None:
            for _ in range(last - first):
                if self._at_its_end(self._scheduler):
                    break
                self._scheduler.step()

    def refresh(self, tau: float) -> None:
        """Give a group that was added its rate, where a function of tau says it."""
        if self._lr_at is not None:
            self._set(math.floor(tau))

    def state_dict(self) -> dict[str, Any] | None:
        """Return the scheduler's own state; a function of tau has none."""
        return None if self._scheduler is None else self._scheduler.state_dict()

    def check(self, state: dict[str, Any] | None) -> None:
        """Refuse a state that this schedule cannot go on from."""
        if self._scheduler is not None and state is None:
            raise ValueError("the AdaScale state has no scheduler, this AdaScale has one: drop it, or start anew")

    def load_state_dict(self, state: dict[str, Any] | None, tau: float) -> None:
        """Go on from `state_dict()`; the groups' rates are the optimizer's state, or what lr_at says."""
        self.check(state)
        if self._scheduler is not None and state is not None:
            self._scheduler.load_state_dict(state)
        self.refresh(tau)

    @staticmethod
    def _at_its_end(scheduler: LRScheduler) -> bool:
        """OneCycleLR raises beyond its last step, and the last gain carries tau beyond the target."""
        total = getattr(scheduler, "total_steps", None)
        return isinstance(total, int) and scheduler.last_epoch >= total - 1

    def _set(self, tau: int) -> None:
        assert self._lr_at is not None
        groups, rates = self._optimizer.param_groups, self._lr_at(tau)
        each = list(rates) if isinstance(rates, Sequence) else [rates] * len(groups)
        if len(each) != len(groups):
            raise ValueError(
                f"the schedule gave {len(each)} learning rates at tau {tau}; the optimizer has {len(groups)} groups"
            )
        for group, rate in zip(groups, each, strict=True):
            if not (isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0):
                raise ValueError(f"the schedule gave {rate!r} at tau {tau}; allowed: finite numbers from 0")
            if isinstance(group["lr"], Tensor):
                with torch.no_grad():
                    group["lr"].fill_(rate)
            else:
                group["lr"] = float(rate)
