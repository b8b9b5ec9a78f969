"""Learning-rate rules: how a step at scale S uses a schedule that was written for S = 1.

A rule is a pure function `rule(state, scale) -> RuleStep`. The optimizer multiplies the schedule's rate at
floor(tau) by `lr_factor` and then advances tau by `tau_increment`. AdaScale is the rule to use; the others
are baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from stretto.gain import GainEstimator

WARMUP_FRACTION = 0.055  # Goyal et al.: the first 5.5 % of the steps


@dataclass(frozen=True)
class RuleState:
    """What a rule may look at: the estimator, with this step's statistics in it, and tau before the step.

    `target_tau` is the schedule's whole length in iterations at S = 1, `step_budget` the steps that it is to be
    stretched to, where the user has said so.
    """

    estimator: GainEstimator
    tau: float = 0.0
    target_tau: float | None = None
    step_budget: int | None = None


class RuleStep(NamedTuple):
    """What a rule decides for one step."""

    lr_factor: float
    tau_increment: float


Rule = Callable[[RuleState, float], RuleStep]


def identity(state: RuleState, scale: float) -> RuleStep:
    """Use the schedule as it stands: rate lr, tau += 1."""
    return RuleStep(1.0, 1.0)


def linear(state: RuleState, scale: float) -> RuleStep:
    """Scale the rate with the batch: rate S * lr, tau += S."""
    return RuleStep(scale, scale)


def linear_warmup(state: RuleState, scale: float) -> RuleStep:
    """Scale linearly (LSW), but let the factor rise from 1 to S over the first 5.5 % of the schedule.

    Counted in tau, which is the same as counting steps while S is constant and stays right when it changes.
    Needs `target_tau`. Source: Goyal et al. 2017, as used for comparison in the AdaScale paper.
    """
    return RuleStep(_warmed_up(state, scale), scale)


def linear_warmup_stretched(state: RuleState, scale: float) -> RuleStep:
    """LSW stretched to `step_budget` steps (LSW+): the factor of LSW, tau += target_tau / step_budget.

    What AdaScale's steps would have brought to linear scaling, in the AdaScale paper's comparison.
    """
    factor = _warmed_up(state, scale)
    assert state.target_tau is not None
    if state.step_budget is None:
        raise ValueError(_NEEDS.format(name="linear_warmup_stretched", what="step_budget", value="<steps>"))
    return RuleStep(factor, state.target_tau / state.step_budget)


def sqrt(state: RuleState, scale: float) -> RuleStep:
    """Scale with the root of the batch: rate sqrt(S) * lr, tau += S."""
    return RuleStep(math.sqrt(scale), scale)


def adascale(state: RuleState, scale: float) -> RuleStep:
    """Scale with the gain: rate r * lr, tau += r (Johnson et al. 2020)."""
    gain = state.estimator.gain(scale)
    return RuleStep(gain, gain)


def adamscale(state: RuleState, scale: float) -> RuleStep:
    """For Adam and AdamW: rate sqrt(r) * lr, tau += r, with r from preconditioned gradients (Pollux, OSDI 2021).

    The estimator has seen gradients divided by Adam's root of the second moment, from its fifth step on.
    """
    gain = state.estimator.gain(scale)
    return RuleStep(math.sqrt(gain), gain)


_NEEDS = (
    'rule "{name}" has to know {what}, which is not set: pass settings=AdaScaleSettings({what}={value}); target_tau is '
    "the schedule's length in iterations at S = 1"
)


def adasum(state: RuleState, scale: float) -> RuleStep:
    """For gradients that the ranks combine by Adasum: rate lr, tau += 1; the schedule is not stretched."""
    return RuleStep(1.0, 1.0)


def adasum_delta(state: RuleState, scale: float) -> RuleStep:
    """For moves that the ranks combine by Adasum, each having taken its own step: rate lr, tau += 1."""
    return RuleStep(1.0, 1.0)


_BY_NAME: dict[str, Rule] = {
    "identity": identity,
    "linear": linear,
    "linear_warmup": linear_warmup,
    "linear_warmup_stretched": linear_warmup_stretched,
    "sqrt": sqrt,
    "adascale": adascale,
    "adamscale": adamscale,
    "adasum": adasum,
    "adasum-delta": adasum_delta,
}


def named(rule: str | Rule) -> Rule:
    """Return the rule of that name; a callable is a rule already."""
    if callable(rule):
        return rule
    if rule not in _BY_NAME:
        raise ValueError(f"rule is {rule!r}; allowed: {', '.join(sorted(_BY_NAME))}, or a function (state, scale)")
    return _BY_NAME[rule]


def is_preconditioned(rule: Rule) -> bool:
    """Whether the rule's gain is that of gradients as Adam scales them."""
    return rule is adamscale


def check_settings(rule: Rule, *, target_tau: float | None, step_budget: int | None) -> None:
    """Raise ValueError where a rule would lack what it has to know, before the first step."""
    if rule in (linear_warmup, linear_warmup_stretched):
        rule(RuleState(GainEstimator(), 0.0, target_tau, step_budget), 1.0)


def _warmed_up(state: RuleState, scale: float) -> float:
    if state.target_tau is None:
        raise ValueError(_NEEDS.format(name="linear_warmup", what="target_tau", value="<iterations>"))
    return 1.0 + (scale - 1.0) * min(state.tau / (WARMUP_FRACTION * state.target_tau), 1.0)
