"""One optimizer step of all ranks together, and what they agree on in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stretto.adascale import AdaScale
from stretto.feed import MicroBatch, Share
from stretto.mixed_precision import MixedPrecision
from stretto.random_state import seed_step

LossFunction = Callable[[torch.nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The same on every rank, but for `step_s`. `loss`: the mean over the step's samples."""

    loss: float
    base_lr: tuple[float, ...]
    tau_before: float
    skipped: bool
    # The sums over the ranks of what each wished.
    agreed: tuple[float, ...]
    step_s: float


class Stepper:
    """Takes steps at one world size; a new one for each."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: AdaScale,
        loss_fn: LossFunction,
        share: Share,
        *,
        seed: int,
        precision: MixedPrecision,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._share = share
        self._seed = seed
        self._precision = precision
        self._device = next(model.parameters()).device

    def take(
        self,
        number: int,
        samples: int,
        batches: Iterable[tuple[MicroBatch, Any]],
        wishes: Callable[[], Sequence[float]],
    ) -> Outcome:
        """Forward, backward and step. samples: of all ranks. wishes: asked as late as can be."""
        started_s = time.monotonic()
        optimizer = self._optimizer
        optimizer.zero_grad()
        losses = []
        for micro_batch, (part, batch) in enumerate(batches, start=1):
            seed_step(self._seed, number, self._share.rank, micro_batch)
            with self._synchronised(last=micro_batch == self._share.micro_batches):
                optimizer.set_num_samples(part.samples, total=samples)
                with self._precision.casting(self._device):
                    loss = self._loss_fn(self._model, batch)
                self._precision.backward(loss / self._share.micro_batches)
            if part.samples:
                losses.append(loss.detach() * part.samples)
        base_lr, tau_before = tuple(float(group["lr"]) for group in optimizer.param_groups), optimizer.tau
        skipped_before = optimizer.skipped_steps
        optimizer.set_agreement([*wishes(), float(sum(losses))])
        self._precision.step(optimizer)
        *agreed, loss_sum = optimizer.agreed
        return Outcome(
            loss=loss_sum / samples,
            base_lr=base_lr,
            tau_before=tau_before,
            skipped=optimizer.skipped_steps > skipped_before,
            agreed=tuple(agreed),
            step_s=time.monotonic() - started_s,
        )

    def _synchronised(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients meet once per step, in the backward of its last micro-batch."""
        if last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()
