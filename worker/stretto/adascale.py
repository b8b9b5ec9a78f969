"""AdaScale: an optimizer around an optimizer that keeps one schedule right at any scale.

Johnson, Agrawal, Gu and Guestrin, "AdaScale SGD", ICML 2020. One step: the backward passes collect squared
norms, `step()` adds them up over the ranks in one small all-reduce, the estimator turns them into the gain
r, the inner optimizer runs at r times its learning rate, tau advances by r, and the scheduler moves once
per integer of tau.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stretto import learning_rate, rules
from stretto.adascale_options import (
    AdaScaleSettings,
    check_parameters,
    checked_model,
    checked_optimizer,
    checked_rule,
    whole,
)
from stretto.adasum.switch import check_optimizer, hook_for, scheduled
from stretto.contributions import Contributions, make_contributions, world_size
from stretto.ddp_norms import AllReduce, CommHook
from stretto.gain import GainEstimator
from stretto.measure import Measure, Sources
from stretto.norms import SqrNorm
from stretto.schedule import LrAt, Schedule
from stretto.window import StepTotals, Window
from stretto.wrapped_optimizer import WrappedOptimizer

FORMAT_VERSION = 1
WARM_UPDATES = 100  # samples in the averages before a statistics_interval leaves any out

_log = logging.getLogger(__name__)


class AdaScale(WrappedOptimizer):
    """Runs `optimizer` with its learning rate scaled to the batch that each step really used.

    `model` is what the loop trains: DDP, a module after `fully_shard`, or a bare module on one process.
    `base_batch_size`: samples per step that the learning-rate schedule was written for. `batch_size`: samples
    per rank and micro-batch (default: the base batch size). With `accumulation_steps` m, divide each loss by m
    as usual. `scheduler`: a torch scheduler on the inner optimizer, which the loop must not step, or a function
    of tau that returns the learning rate. `rule`: see `stretto.rules`. `comm_hook`: a DDP hook, or
    (state, hook), to compose with.

    Every rank calls `step()`; parameters, tau and statistics stay untouched when it raises. A step whose
    gradient is not finite on any rank is skipped on every rank. Clip between backward and step: the
    statistics were taken before. With a single contribution per step (one rank, no accumulation) the
    averages stay as they are and are used as they are; before there are any, r is 1 at every scale. Below
    the base batch size (S < 1) the formulas hold too: r < 1, and tau advances by less than 1.
    Half-collected statistics are not part of `state_dict()`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module,
        *,
        base_batch_size: int,
        batch_size: int | None = None,
        accumulation_steps: int = 1,
        scheduler: LRScheduler | LrAt | None = None,
        rule: str | rules.Rule = "adascale",
        grad_scaler: torch.amp.GradScaler | None = None,
        comm_hook: CommHook | tuple[Any, CommHook] | None = None,
        settings: AdaScaleSettings | None = None,
    ) -> None:
        super().__init__(checked_optimizer(optimizer))
        self._settings = settings or AdaScaleSettings()
        self._base_batch_size = whole("base_batch_size", base_batch_size)
        self._batch_size = self._base_batch_size if batch_size is None else whole("batch_size", batch_size)
        self._accumulation_steps = whole("accumulation_steps", accumulation_steps)
        self._rule = checked_rule(rule, optimizer, self._settings)
        check_optimizer(self._rule, optimizer)
        self._measure = Measure(optimizer, preconditioned=rules.is_preconditioned(self._rule))
        self._grad_scaler = grad_scaler
        self._comm_hook = comm_hook
        self._estimator = GainEstimator(smoothing=self._settings.smoothing, clip=self._settings.clip)
        self._tau, self._gain, self._skipped_steps, self._unmeasured = 0.0, 1.0, 0, 0
        self._rates, self._factor = learning_rate.current(optimizer.param_groups), 1.0
        self._agreement: list[float] = []
        self._agreed: list[float] = []
        self._contributions: Contributions | None = None
        self.rebind(model)
        self._schedule = Schedule(scheduler, scheduled(optimizer))

    # -- the model
    # ---------------------------------------------------------------------------------------------

    def rebind(
        self,
        model: torch.nn.Module,
        *,
        batch_size: int | None = None,
        accumulation_steps: int | None = None,
        comm_hook: CommHook | tuple[Any, CommHook] | None = None,
        all_reduce: AllReduce | None = None,
    ) -> None:
        """Go on with the same parameters in a new DDP at another world size, or bare on one process.

        Averages, tau, the inner optimizer and its state stay. Arguments that are given replace the old ones. A step
        that was under way, wherever it broke off, is forgotten together with its gradients: take it again from its
        first forward. `all_reduce`: starts every collective of this binding, such as `Group.all_reduce`, which a cut
        releases at once; it is never kept for the next one. Without it they go to torch, over the model's process
        group. A `comm_hook` starts its own.
        """
        module = checked_model(model)
        self.unbind()
        self._model = weakref.ref(module)
        self._check_parameters(p for group in self._inner.param_groups for p in group["params"])
        if batch_size is not None:
            self._batch_size = whole("batch_size", batch_size)
        if accumulation_steps is not None:
            self._accumulation_steps = whole("accumulation_steps", accumulation_steps)
        if comm_hook is not None:
            self._comm_hook = comm_hook
        self._world_size = world_size(module, self._parameters())
        self._window = Window(
            batch_size=self._batch_size,
            accumulation_steps=self._accumulation_steps,
            world_size=self._world_size,
        )
        self._scale = self._window.nominal_total / self._base_batch_size
        self._measure.cover(module)
        self._contributions = make_contributions(
            module,
            self._window,
            Sources(
                parameters=self._parameters,
                measure=self._measure,
                loss_scale=self._loss_scale,
                sum_loss=self._settings.accumulated_loss == "sum",
            ),
            comm_hook=hook_for(self._rule, module, self._comm_hook),
            all_reduce=all_reduce,
        )
        self._contributions.attach()

    def unbind(self) -> None:
        """Let go of the model's hooks, process group and gradients; `step()` is refused until `rebind`."""
        if self._contributions is not None:
            self._contributions.detach()
            # Besides being half a step's, they may be views of DDP's buckets, which a dying collective writes to.
            self._inner.zero_grad(set_to_none=True)
            self._forget_unscaled()
        self._contributions = None

    def _forget_unscaled(self) -> None:
        """Have the GradScaler unscale again: it believes that the gradients it saw in a broken step are still there."""
        scaler = self._grad_scaler
        if scaler is not None and scaler.is_enabled():
            self._loss_scale(next(iter(self._parameters())).device)  # a scaler that was never used cannot be updated
            scaler.update(scaler.get_scale())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _loss_scale(self, device: torch.device) -> SqrNorm:
        """What the GradScaler multiplies losses by right now, read without waiting for an accelerator."""
        if self._grad_scaler is None or not self._grad_scaler.is_enabled():
            return 1.0
        scale = self._grad_scaler.scale(torch.ones((), device=device))
        return float(scale) if device.type == "cpu" else scale

    def _check_parameters(self, parameters: Iterable[Tensor]) -> None:
        module = self._model()
        check_parameters(parameters, module)

    # -- the step
    # ----------------------------------------------------------------------------------------------

    def set_num_samples(self, n: int, total: int | None = None) -> None:
        """Say that the next micro-batch has `n` samples; gradients are then weighted by samples.

        Call it before the micro-batch's forward; 0 is allowed. `total`: samples of the whole step, over all
        ranks and micro-batches; give it on every rank or on none. Without it the ranks add their sizes up,
        so every rank has to call this. Needed when accumulation_steps > 1, where a micro-batch is weighted
        before the rest is seen.
        """
        n = whole("n", n, minimum=0)
        if total is not None and whole("total", total) < n:
            raise ValueError(f"total is {total}, less than this micro-batch's own n = {n}")
        if total is None and self._accumulation_steps > 1:
            raise ValueError(
                f"total is missing: with accumulation_steps = {self._accumulation_steps} give the samples of the "
                "whole step, over all ranks and micro-batches"
            )
        self._bound().announce(n, total)

    def ignore_statistics(self) -> None:
        """Leave the next step out of the averages, on every rank; call it before the step's first backward."""
        self._measure.active = False

    def set_agreement(self, values: Sequence[float]) -> None:
        """Attach numbers to the all-reduce of each following step; `agreed` then holds their sums over the ranks.

        Every rank attaches equally many. A flag of 0 or 1 is set on every rank where its sum is the world
        size.
        """
        self._agreement = [float(value) for value in values]

    @property
    def agreed(self) -> list[float]:
        """The sums over the ranks of what they attached to the latest step; also after a skipped one."""
        return list(self._agreed)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step at the scaled rate; returns the closure's loss, if there is a closure.

        The closure is called once, before the statistics are read.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        totals = self._exchange()
        if totals.problem:
            raise ValueError(totals.problem)
        if not (math.isfinite(totals.local_sqr_norm) and math.isfinite(totals.global_sqr_norm)):
            # Decided on what was reduced, so every rank skips alike.
            self._skipped_steps += 1
            _log.warning("step skipped at tau %.1f: the gradient is not finite", self._tau)
            return loss
        scale = totals.samples / self._base_batch_size
        estimator = copy.copy(self._estimator)  # becomes ours only when the inner step has succeeded
        estimator.update(
            local_sqr_norm=max(totals.local_sqr_norm, 0.0),
            global_sqr_norm=totals.global_sqr_norm,
            num_contributions=totals.num_contributions,
            scale=scale,
        )
        state = rules.RuleState(estimator, self._tau, self._settings.target_tau, self._settings.step_budget)
        factor, increment = self._rule(state, scale)
        rates = learning_rate.current(self._inner.param_groups)
        with learning_rate.scaled(self._inner.param_groups, factor):
            self._inner.step()
        self._estimator, self._scale, self._gain = estimator, scale, estimator.gain(scale)
        self._rates, self._factor = rates, factor
        self._unmeasured = 0 if self._measure.active else self._unmeasured + 1
        before, self._tau = self._tau, self._tau + increment
        self._schedule.advance(before, self._tau)
        self._choose_measured()
        return loss

    def _exchange(self) -> StepTotals:
        """Add this step's statistics up over the ranks; they are used up even when that fails."""
        contributions = self._bound()
        try:
            totals = contributions.totals(self._agreement)
        finally:
            contributions.discard()
            contributions.attach()
        self._agreed = totals.agreed
        return totals

    def _choose_measured(self) -> None:
        """Whether the next step's statistics are wanted; every rank has the same numbers, and chooses alike."""
        interval = self._settings.statistics_interval
        warm = self._estimator.num_updates >= WARM_UPDATES
        self._measure.active = not warm or self._unmeasured + 1 >= interval

    def _bound(self) -> Contributions:
        if self._contributions is None:
            raise RuntimeError("AdaScale is not bound to a model: call rebind(model) after unbind()")
        return self._contributions

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and the statistics that were collected with them."""
        self._inner.zero_grad(set_to_none=set_to_none)
        if self._contributions is not None:
            self._contributions.discard()
            self._contributions.attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters have to be the model's."""
        parameters = param_group["params"]
        param_group["params"] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self._check_parameters(param_group["params"])
        self._inner.add_param_group(param_group)
        self._schedule.refresh(self._tau)
        module = self._model()
        if self._contributions is not None and module is not None:
            self._measure.cover(module)
            self._contributions.attach()

    # -- what the latest step was
    # ------------------------------------------------------------------------------

    @property
    def gain(self) -> float:
        """r of the latest step, whatever the rule made of it; 1.0 before the first."""
        return self._gain

    @property
    def tau(self) -> float:
        """Scale-invariant iterations so far; the schedule is read at floor(tau)."""
        return self._tau

    @property
    def scale(self) -> float:
        """S of the latest step; before the first since `rebind`, what is expected."""
        return self._scale

    @property
    def effective_lr(self) -> list[float]:
        """The learning rate that the latest step used, per group."""
        return [float(rate) * self._factor for rate in self._rates]

    @property
    def variance(self) -> float:
        """sigma^2, averaged; at the base batch size."""
        return self._estimator.variance

    @property
    def sqr_norm(self) -> float:
        """mu^2, averaged."""
        return self._estimator.sqr_norm

    @property
    def world_size(self) -> int:
        """Ranks that share each step."""
        return self._world_size

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because the gradient was not finite."""
        return self._skipped_steps

    # -- the state
    # ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state with one more entry, "adascale", of plain numbers and the schedule."""
        own = {
            "format_version": FORMAT_VERSION,
            "tau": self._tau,
            "gain": self._gain,
            "scale": self._scale,
            "unmeasured_steps": self._unmeasured,
            "estimator": self._estimator.state_dict(),
            "scheduler": self._schedule.state_dict(),
        }
        return {**self._inner.state_dict(), "adascale": own}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Continue from a `state_dict()`, at any world size; what is refused changes nothing."""
        own = d.get("adascale")
        if not isinstance(own, dict):
            raise ValueError(
                'the state has no "adascale" entry, so another optimizer wrote it; to start AdaScale from it, '
                "load it into the inner optimizer"
            )
        if own.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"the AdaScale state has format version {own.get('format_version')!r}; this release reads "
                f"{FORMAT_VERSION}: load it with the release that wrote it"
            )
        missing = sorted(self.state_dict()["adascale"].keys() - own.keys())
        if missing:
            raise ValueError(f"the AdaScale state lacks {', '.join(missing)}; it was not written by state_dict()")
        self._schedule.check(own["scheduler"])
        estimator = copy.copy(self._estimator)
        estimator.load_state_dict(own["estimator"])
        self._inner.load_state_dict({key: value for key, value in d.items() if key != "adascale"})
        self._schedule.load_state_dict(own["scheduler"], float(own["tau"]))
        self._estimator, self._unmeasured = estimator, int(own["unmeasured_steps"])
        self._tau, self._gain, self._scale = float(own["tau"]), float(own["gain"]), float(own["scale"])
        self._choose_measured()
        self._rates, self._factor = learning_rate.current(self._inner.param_groups), 1.0
        if self._contributions is not None:
            self._contributions.discard()
