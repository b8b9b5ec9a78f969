"""What AdaScale accepts: its settings, and the checks on what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto import rules
from stretto.gain import Clip


@dataclass(frozen=True)
class AdaScaleSettings:
    """Options that few users change.

    `smoothing`, `clip`: of the `GainEstimator`. `accumulated_loss`: "mean" where each micro-batch's loss is
    divided by accumulation_steps, "sum" where it is not. `target_tau`: the schedule's length in iterations
    at S = 1, which the rules with a warm-up need; `step_budget`: the steps to stretch it to, for rule
    "linear_warmup_stretched". `statistics_interval`: measure gradients in every k-th step only, once 100 samples
    are in the averages; in the others just whether they are finite.
    """

    smoothing: Literal["paper"] | float = "paper"
    clip: Clip = "on-read"
    accumulated_loss: Literal["mean", "sum"] = "mean"
    target_tau: float | None = None
    step_budget: int | None = None
    statistics_interval: int = 1

    def __post_init__(self) -> None:
        if self.accumulated_loss not in ("mean", "sum"):
            raise ValueError(f'accumulated_loss is {self.accumulated_loss!r}; allowed: "mean", "sum"')
        if self.target_tau is not None and not self.target_tau > 0:
            raise ValueError(f"target_tau is {self.target_tau}; allowed: a number above 0")
        if self.step_budget is not None:
            whole("step_budget", self.step_budget)
        whole("statistics_interval", self.statistics_interval)


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


def checked_rule(rule: str | rules.Rule, optimizer: Optimizer, settings: AdaScaleSettings) -> rules.Rule:
    """Return a rule that suits the optimizer and has what it needs, or say why it cannot be used."""
    chosen = rules.named(rule)
    if rules.is_preconditioned(chosen) and not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(
            f'rule "adamscale" measures gradients as Adam scales them, and the optimizer is a '
            f"{type(optimizer).__name__}; allowed: Adam, AdamW"
        )
    rules.check_settings(chosen, target_tau=settings.target_tau, step_budget=settings.step_budget)
    return chosen


def checked_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that the loop trains, without torch.compile's wrapper, or say why it is none."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; allowed: the torch.nn.Module that the loop calls, in DDP or not"
        )
    module: torch.nn.Module = getattr(model, "_orig_mod", model)
    return module


def check_parameters(parameters: Iterable[Tensor], module: torch.nn.Module | None) -> None:
    """Raise ValueError unless the model has parameters and these are among them."""
    known = {id(p) for p in module.parameters()} if module is not None else set()
    if not known:
        raise ValueError("model has no parameters; give the model that the optimizer trains")
    strangers = sum(id(p) not in known for p in parameters)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's parameters are not the model's: make the optimizer from "
            "model.parameters(), after moving or wrapping the model in ways that replace them"
        )


def whole(name: str, value: Any, *, minimum: int = 1) -> int:
    """Return a whole number (NumPy's too) that is at least `minimum`, or say what was given."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {minimum}")
    return int(value)
