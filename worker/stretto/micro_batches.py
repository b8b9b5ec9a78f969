"""Contributions of one process: its micro-batches, seen by hooks on the parameters during each backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stretto.measure import Sources
from stretto.norms import SqrNorm, sum_sqr_norms
from stretto.window import LocalSums, StepTotals, Window


class LeafHooks:
    """Calls back when a backward begins, and for each parameter's gradient before it is accumulated.

    `on_gradient(parameter, gradient)` may return a replacement for the gradient of this micro-batch alone.
    `on_accumulated` runs after `param.grad` has grown by it.
    """

    def __init__(
        self,
        *,
        on_begin: Callable[[torch.device], None],
        on_gradient: Callable[[Tensor, Tensor], Tensor | None],
        on_accumulated: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._on_begin = on_begin
        self._on_gradient = on_gradient
        self._on_accumulated = on_accumulated
        self._hooked: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._backward = -1

    def attach(self, parameters: Iterable[Tensor]) -> None:
        """Hook the parameters that need gradients and are not hooked yet."""
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked[id(parameter)] = parameter  # holding it keeps its id from being used again
                leaf: Any = parameter  # torch leaves its hook methods untyped
                self._handles.append(leaf.register_hook(partial(self._gradient, parameter)))
                if self._on_accumulated is not None:
                    self._handles.append(leaf.register_post_accumulate_grad_hook(self._on_accumulated))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()

    def _gradient(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        # The engine numbers its backwards; register_multi_grad_hook would keep one entry for each, for ever.
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._on_begin(grad.device)
        return self._on_gradient(parameter, grad)


class MicroBatchContributions:
    """Statistics of a model on one process: each micro-batch's gradient is one contribution.

    With one micro-batch per step there is nothing to compare and nothing is hooked: the step still learns
    whether its gradient is finite.
    """

    def __init__(
        self,
        sources: Sources,
        window: Window,
    ) -> None:
        self._parameters, self._measure = sources.parameters, sources.measure
        self._loss_scale, self._sum_loss = sources.loss_scale, sources.sum_loss
        self._window = window
        self._hooks = LeafHooks(on_begin=self._begin, on_gradient=self._gradient, on_accumulated=self._accumulated)
        self.discard()

    def attach(self) -> None:
        """Hook parameters that came or were unfrozen since the last call."""
        if self._window.accumulation_steps > 1:
            self._hooks.attach(self._parameters())

    def detach(self) -> None:
        self._hooks.detach()

    def discard(self) -> None:
        """Forget this step's statistics."""
        self._window.clear()
        self._start()

    def announce(self, samples: int, total: int | None) -> None:
        self._window.announce(samples, total)

    def totals(self, agreement: Sequence[float]) -> StepTotals:
        """Return the statistics of the micro-batches since the last step: there is one process."""
        sums = self._local_sums()
        values = [float(value) for value in sums.encode(agreement)]
        return StepTotals.decode(values, world_size=1, problem=sums.problem)

    def _local_sums(self) -> LocalSums:
        window = self._window
        if not window.micro_batches:  # one micro-batch per step, or gradients that no backward has made
            own = self._parameters()
            samples = window.next_samples * window.accumulation_steps
            window.open_micro_batch()  # uses up the announcement
            square = sum_sqr_norms(self._measure.of(p, p.grad) for p in own if p.grad is not None)
            declared = window.total is not None
            return LocalSums(samples, 1, samples * square, square, float(window.total or samples), declared=declared)
        # The user divided each loss by the number of micro-batches; for a sum of losses both norms shrink
        # alike.
        undo = window.accumulation_steps**2
        shrink = 1.0 / (self._scale * self._scale * (undo if self._sum_loss else 1))
        weighted = sum_sqr_norms(n * undo * norm for n, norm in zip(self._sizes, self._norms, strict=True))
        return LocalSums(
            samples=window.samples,
            contributions=sum(1 for n in self._sizes if n) if self._measure.active else 0,
            weighted_sqr_norm=weighted * shrink,
            global_sqr_norm=sum_sqr_norms(self._total.values()) * shrink,
            denominator=float(window.denominator),
            declared=window.total is not None,
            problem=window.problem,
        )

    def _start(self) -> None:
        self._sizes: list[int] = []
        self._norms: list[SqrNorm] = []
        self._total: dict[int, SqrNorm] = {}
        self._scale: SqrNorm = 1.0

    def _begin(self, device: torch.device) -> None:
        self._window.open_micro_batch()
        if self._window.micro_batches == 1:
            self._start()
        self._scale = self._loss_scale(device)
        self._sizes.append(self._window.latest)
        self._norms.append(0.0)

    def _gradient(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        window = self._window
        if window.latest == 0:
            return torch.zeros_like(grad)  # the mean over no samples is NaN
        if self._measure.active:
            self._norms[-1] = sum_sqr_norms((self._norms[-1], self._measure.of(parameter, grad)))
        return micro_batch_weighted(grad, window)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._total[id(parameter)] = self._measure.of(parameter, parameter.grad)


def micro_batch_weighted(grad: Tensor, window: Window) -> Tensor | None:
    """Return one micro-batch's gradient with its weight in the step, or None where the weight is 1."""
    weight = window.latest * window.accumulation_steps * window.world_size / window.denominator
    return None if weight == 1.0 else grad * weight
