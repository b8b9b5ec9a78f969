"""What AdaScale accepts: its settings, and the checks on what it is given."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stretto.gain import Clip


@dataclass(frozen=True)
class AdaScaleSettings:
    """Options that few users change.

    `smoothing`, `clip`: of the `GainEstimator`. `accumulated_loss`: "mean" where each micro-batch's loss is
    divided by accumulation_steps, "sum" where it is not. `target_tau`: the schedule's length in iterations
    at S = 1, which rule "linear_warmup" needs.
    """

    smoothing: Literal["paper"] | float = "paper"
    clip: Clip = "on-read"
    accumulated_loss: Literal["mean", "sum"] = "mean"
    target_tau: float | None = None

    def __post_init__(self) -> None:
        if self.accumulated_loss not in ("mean", "sum"):
            raise ValueError(f'accumulated_loss is {self.accumulated_loss!r}; allowed: "mean", "sum"')
        if self.target_tau is not None and not self.target_tau > 0:
            raise ValueError(f"target_tau is {self.target_tau}; allowed: a number above 0")


def checked_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer that AdaScale can wrap, or say why it cannot."""
    if "AdaScale" in {base.__name__ for base in type(optimizer).__mro__}:
        raise ValueError("optimizer is an AdaScale already; wrap the optimizer inside it once")
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer")
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has groups without an lr, so there is nothing to scale")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates its closure several times per step; AdaScale's statistics are of "
            "one evaluation: use an optimizer that needs none"
        )
    return optimizer


def checked_scheduler(scheduler: LRScheduler | None, owners: tuple[Optimizer, ...]) -> LRScheduler | None:
    """Return a scheduler that belongs to one of `owners` and can follow tau, or say why it cannot."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau follows a metric, not tau; step it yourself and pass no scheduler")
    if scheduler is not None and not any(scheduler.optimizer is owner for owner in owners):
        raise ValueError("scheduler belongs to another optimizer; make it with the optimizer given to AdaScale")
    return scheduler


def world_size(module: torch.nn.Module) -> int:
    """Return how many ranks share the model's gradients, or say why they cannot."""
    if isinstance(module, DistributedDataParallel):
        return dist.get_world_size(module.process_group)
    sharded = {"FSDPModule", "FullyShardedDataParallel"} & {base.__name__ for base in type(module).__mro__}
    if sharded:
        raise ValueError(f"model is sharded ({sharded.pop()}), which is not supported: wrap it in DDP instead")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"model is not wrapped in DDP, but there are {dist.get_world_size()} ranks, whose gradients would never "
            "meet: pass DistributedDataParallel(model)"
        )
    return 1


def whole(name: str, value: int, *, minimum: int = 1) -> int:
    """Return a whole number that is at least `minimum`, or say what was given."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {minimum}")
    return value
