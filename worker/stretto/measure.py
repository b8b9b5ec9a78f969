"""What is measured of a gradient: whose parameters count, in which norm, and whether in this step at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.norms import SqrNorm, finite_mark, sqr_norm, sum_sqr_norms

# Adam's second moment is a mean of so many squares; 1/moment^2 has no finite mean before the fifth.
_WARM_STEPS = 5


class Measure:
    """Squared norms of gradients, plain or preconditioned by Adam's second moment.

    `active`: false in a step whose statistics are not wanted; norms are then a mark, 0.0 where the gradient is finite
    and NaN where it is not. Parameters that `optimizer` does not train count for nothing.
    """

    def __init__(self, optimizer: Optimizer, *, preconditioned: bool) -> None:
        self._optimizer = optimizer
        self._preconditioned = preconditioned
        self._whole = True
        self._own: dict[int, dict[str, Any]] = {}
        self.active = True

    def cover(self, model: torch.nn.Module) -> None:
        """Note whose parameters count, after groups were added or the model was exchanged."""
        groups = self._optimizer.param_groups
        self._own = {id(parameter): group for group in groups for parameter in group["params"]}
        self._whole = all(id(parameter) in self._own for parameter in model.parameters() if parameter.requires_grad)

    @property
    def flat(self) -> bool:
        """Whether a flat buffer of gradients is measured as it stands, in one pass."""
        return self._whole and not (self._preconditioned and self.active)

    def of(self, parameter: Tensor, grad: Tensor) -> SqrNorm:
        """Return the squared norm of one parameter's gradient; shapes agree. Never waits for an accelerator."""
        group = self._own.get(id(parameter))
        if group is None:
            return 0.0
        if not self.active:
            return finite_mark(grad)
        if not self._preconditioned:
            return sqr_norm(grad)
        return self._preconditioned_norm(parameter, grad, group)

    def of_buffer(self, buffer: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> SqrNorm:
        """Return the squared norm of a flat buffer; `gradients`, of these parameters, say where in it they lie."""
        if self.flat:
            return sqr_norm(buffer) if self.active else finite_mark(buffer)
        start = int(gradients[0].storage_offset()) if gradients else 0
        return sum_sqr_norms(
            self.of(parameter, _view(buffer, grad, start))
            for parameter, grad in zip(parameters, gradients, strict=True)
        )

    def _preconditioned_norm(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> SqrNorm:
        state = self._optimizer.state.get(parameter, {})
        step = state.get("step", 0.0)
        if not (isinstance(step, Tensor) and step.device.type != "cpu"):
            step = float(step)
            if step < _WARM_STEPS:
                return finite_mark(grad)
        moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        correction = (1.0 - float(group["betas"][1]) ** step) ** 0.5
        denominator = moment.sqrt().div_(correction).add_(group["eps"])
        # Where no gradient was ever seen Adam knows no scale: such elements would drown all others.
        denominator.masked_fill_(moment == 0, math.inf)
        norm = sqr_norm(grad / denominator) + finite_mark(grad)
        # A step count on an accelerator (capturable) must not be waited for.
        return torch.where(step >= _WARM_STEPS, norm, 0.0) if isinstance(step, Tensor) else norm


@dataclass(frozen=True)
class Sources:
    """What every kind of contributions reads: the optimizer's parameters, how they are measured, the loss's scale."""

    parameters: Callable[[], Iterable[Tensor]]
    measure: Measure
    loss_scale: Callable[[torch.device], SqrNorm]
    sum_loss: bool


def _view(buffer: Tensor, grad: Tensor, start: int) -> Tensor:
    """The part of `buffer` that lies where `grad` lies in its own, of which the first gradient starts at `start`."""
    offset = int(grad.storage_offset()) - start + int(buffer.storage_offset())
    return buffer.as_strided(grad.size(), grad.stride(), offset)
