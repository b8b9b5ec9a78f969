"""Buffers that are kept from call to call: a fresh one of 100 MB costs 90 ms of page faults."""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.adasum.kernels import Kernel, kernel_for


class Memory:
    """One buffer per purpose, dtype and device, as large as was ever asked for; one kernel per number of rows."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._kernels: dict[tuple[int, torch.device], Kernel] = {}

    def take(self, purpose: str, elements: int, like: Tensor) -> Tensor:
        """A vector whose values are left over from before; valid until the purpose is taken again."""
        key = (purpose, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < elements:
            self._buffers.pop(key, None)
            self._buffers[key] = buffer = torch.empty(elements, dtype=like.dtype, device=like.device)
        return buffer[:elements]

    def kernel(self, rows: int, device: torch.device) -> Kernel:
        key = (rows, device)
        if key not in self._kernels:
            self._kernels[key] = kernel_for(rows, device)
        return self._kernels[key]
