"""A model's buffers, such as running means: rank 0's at the start of each step, and as they were if a step breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Buffers:
    """What DDP's `broadcast_buffers` does, through operations that a cut ends at once; and the way back.

    DDP would broadcast with calls of its own, which wait for a hung peer until their timeout.
    """

    def __init__(self, model: torch.nn.Module, broadcast: Callable[[Tensor], Tensor] | None) -> None:
        """broadcast(tensor): overwrites it with rank 0's; None where nothing is to be sent."""
        self._buffers = list(model.buffers())
        self._kept = [buffer.detach().clone() for buffer in self._buffers]
        self._broadcast = broadcast if self._buffers else None
        self._sent = False

    def attach(self, wrapped: torch.nn.Module) -> None:
        """Send rank 0's before the first forward of each step."""
        if self._broadcast is not None:
            wrapped.register_forward_pre_hook(self._before_forward)

    def keep(self) -> None:
        """A step is done."""
        self._sent = False
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        """Forget what a step that is not finished has changed."""
        with torch.no_grad():
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)

    def _before_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._sent or self._broadcast is None or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            for dtype in dict.fromkeys(buffer.dtype for buffer in self._buffers):
                same = [buffer for buffer in self._buffers if buffer.dtype == dtype]
                flat = self._broadcast(torch.cat([buffer.detach().reshape(-1) for buffer in same]))
                parts = torch.split(flat, [buffer.numel() for buffer in same])
                for buffer, part in zip(same, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))
        self._sent = True
