"""Autocast and gradient scaling inside a step that all ranks take together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.adascale import AdaScale


@dataclass(frozen=True)
class MixedPrecision:
    """`dtype`: what autocast computes in, bfloat16 or float16; None: as the model is. `grad_scaler`: for float16.

    The scaler's state is handed on and saved with the rest.
    """

    dtype: torch.dtype | None = None
    grad_scaler: torch.amp.GradScaler | None = None

    def validate(self) -> None:
        """Raise ValueError for a combination that makes no sense."""
        if self.dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"mixed_precision.dtype is {self.dtype}; allowed: torch.bfloat16, torch.float16, None")
        if self.dtype == torch.float16 and self.grad_scaler is None:
            raise ValueError(
                "mixed_precision.dtype is torch.float16 without a grad_scaler, so small gradients vanish: pass "
                "MixedPrecision(torch.float16, torch.amp.GradScaler(...)), or use torch.bfloat16"
            )

    def casting(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocast, for forward passes."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Go backwards from the loss, scaled if there is a scaler."""
        scaled = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]  # torch's own

    def step(self, optimizer: AdaScale) -> None:
        """Step; the optimizer itself, not the scaler, skips what is not finite: its all-reduce has to happen."""
        scaler = self.grad_scaler
        if scaler is None or not scaler.is_enabled():
            optimizer.step()
            return
        scaler.unscale_(optimizer)
        optimizer.step()
        scaler.update()
