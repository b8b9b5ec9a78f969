"""DeltaOptimizer: each rank takes its own step, and what the steps did is combined by Adasum (delta mode)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from stretto.adasum.reducer import Algorithm, Reducer, reducer_of
from stretto.adasum.rollback import Rollback
from stretto.adasum.statistics import Statistics, joined

_log = logging.getLogger(__name__)


class DeltaOptimizer(Optimizer):
    """Runs `optimizer` on this rank's own gradients, and moves the parameters by the Adasum of all ranks' moves.

    For optimizers whose step is no multiple of the gradient: SGD with momentum, Adam, AdamW, LAMB and so on. Their
    state then differs from rank to rank; parameters are bitwise the same. The model must not average gradients: train
    the bare module (broadcast it first), or register `stretto.adasum.local_hook` with DDP. `group`: torch's default
    one; without torch.distributed there is one rank. Every rank calls `step`.

    A step that fails on any rank, or whose moves are not finite on any rank, leaves parameters and optimizer state as
    they were on all; the latter counts in `skipped_steps`. GradScaler: `scaler.step(optimizer)` as usual; each rank's
    scaler keeps a scale of its own, on which moves do not depend. Clip this rank's gradient before the step.
    """

    # GradScaler then calls step() on every rank, also on those that found no infinity.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        group: dist.ProcessGroup | None = None,
        algorithm: Algorithm = "auto",
        reducer: Reducer | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer")
        if {"AdaScale", "DeltaOptimizer"} & {base.__name__ for base in type(optimizer).__mro__}:
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}, whose scaling would be applied twice; give the optimizer "
                "inside it"
            )
        self._inner = optimizer
        self._group = group
        self._algorithm = algorithm
        self._reducer = reducer
        self._rollback = Rollback(optimizer)
        self._skipped_steps = 0
        self._statistics: Statistics | None = None
        # Sets up the hooks and profiling of a torch optimizer; its __init__ would copy groups that are shared here.
        super().__setstate__({})

    def rebind(self, reducer: Reducer | None) -> None:
        """Go on with other ranks: over this reducer, or over the process group where it is None."""
        self._reducer = reducer
        # What is left of a step that broke off may still be written to.
        self._rollback = Rollback(self._inner)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of all ranks; returns the closure's loss, if there is one. It is called once, on each rank."""
        loss, problem, cause = None, "", None
        finite = self._unscale()
        self._rollback.keep()
        try:
            try:
                if closure is not None:
                    with torch.enable_grad():
                        loss = closure()
                _refuse_sparse(self._rollback.parameters)
                if finite:
                    self._inner.step()
            except Exception as error:  # noqa: BLE001 - raised below, once the others know
                problem, cause = f"the step failed on this rank: {error}", error
            self._combine(finite, problem)
        except BaseException as error:
            self._rollback.restore()
            if cause is not None and isinstance(error, ValueError):
                raise cause from None
            raise
        return loss

    def _combine(self, finite: bool, problem: str) -> None:
        """Replace this rank's moves by those of all; a rank without a step moves by NaN, which stops all."""
        moves = self._rollback.moves()
        if not finite:
            for move in moves:
                move.fill_(float("nan"))
        reducer = self._reducer or reducer_of(self._group)
        found = reducer.reduce(moves, self._algorithm, problem)
        if not np.isfinite(found.sqr_norms).all():
            self._skipped_steps += 1
            self._rollback.restore()
            _log.warning("step skipped: the move of the parameters is not finite on some rank")
            return
        self._statistics = found
        self._rollback.move()

    def _unscale(self) -> bool:
        """Divide by the GradScaler's scale where one drives this step; whether this rank's gradients are finite."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if scale is not None:
            factor = float(scale.double().reciprocal())
            for parameter in self._rollback.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return found_inf is None or not float(found_inf)

    @property
    def statistics(self) -> Statistics:
        """Of the latest step's moves, parameter by parameter as the ranks exchanged them."""
        return self._statistics or joined([])

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a rank's move was not finite."""
        return self._skipped_steps

    # -- torch's optimizer interface, shared with the inner optimizer

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # torch declares an attribute
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # torch declares an attribute
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # torch declares an attribute
        return self._inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear this rank's gradients."""
        self._inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer, on every rank."""
        self._inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """This rank's own state: the inner optimizer's. Other ranks' differ; a checkpoint holds one for each."""
        return self._inner.state_dict()

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self._inner.load_state_dict(d)


def _refuse_sparse(parameters: list[Tensor]) -> None:
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise ValueError(
                f"parameter {index} has a sparse gradient ({parameter.grad.layout}), which Adasum does not combine: "
                "use a dense one, Embedding(sparse=False)"
            )
