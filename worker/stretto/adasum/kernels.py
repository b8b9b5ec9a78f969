"""Dot products and weighted sums per layer, in float64: blocks are widened one after the other in kept memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.segments import Block, Part
from stretto.adasum.tree import Floats

# Vectors of one length: [rows, elements], or one tensor each.
Rows = Tensor | list[Tensor]

# Elements of one block over all rows: 1 MB in float64, which a core's own cache holds.
_BLOCK_ELEMENTS = 1 << 17
# On an accelerator a block is as long as its launch is worth: 128 MB in float64.
_ACCELERATOR_ELEMENTS = 1 << 24


class Kernel(Protocol):
    """`rows`: one per gradient; `part`: the layers in them."""

    def dots(self, rows: Rows, part: Part) -> Floats:
        """[layers of the part, rows, rows]: the dot products."""

    def weighted_sum(self, rows: Rows, part: Part, weights: Floats, out: Tensor) -> None:
        """Overwrite `out`, which may be one of the rows, with sum_i weights[layer, i] * rows[i]."""


def kernel_for(rows: int, device: torch.device) -> Kernel:
    return CpuKernel(rows) if device.type == "cpu" else TorchKernel(rows, device)


class CpuKernel:
    """NumPy for many short layers in one block, BLAS for pieces of a long one."""

    def __init__(self, rows: int) -> None:
        self._limit = max(_BLOCK_ELEMENTS // rows, 4096)
        self._wide = torch.empty(rows, self._limit, dtype=torch.float64)
        self._products = torch.empty(rows, self._limit, dtype=torch.float64)
        self._sum = torch.empty(self._limit, dtype=torch.float64)

    def dots(self, rows: Rows, part: Part) -> Floats:
        count = len(rows)
        found = np.zeros((len(part.layers), count, count))
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            if block.last - block.first == 1:
                found[block.first] += (wide @ wide.T).numpy()
                continue
            values = wide.numpy()
            products = self._products[:, : block.stop - block.start].numpy()
            for row in range(count):
                np.multiply(values[row:], values[row], out=products[row:])
                sums = np.add.reduceat(products[row:], block.starts, axis=1).T
                found[block.first : block.last, row, row:] += sums
                found[block.first : block.last, row + 1 :, row] += sums[:, 1:]
        return found

    def weighted_sum(self, rows: Rows, part: Part, weights: Floats, out: Tensor) -> None:
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            total = self._sum[: block.stop - block.start]
            if block.last - block.first == 1:
                torch.mv(wide.T, torch.from_numpy(weights[block.first]), out=total)
            else:
                values = wide.numpy()
                values *= np.repeat(weights[block.first : block.last].T, block.sizes, axis=1)
                np.add.reduce(values, axis=0, out=total.numpy())
            out[block.start : block.stop].copy_(total)

    def _widened(self, rows: Rows, block: Block) -> Tensor:
        wide = self._wide[:, : block.stop - block.start]
        if isinstance(rows, Tensor):
            return wide.copy_(rows[:, block.start : block.stop])
        for target, row in zip(wide, rows, strict=True):
            target.copy_(row[block.start : block.stop])
        return wide


class TorchKernel:
    """The same with torch alone, on any device; one read of the results per call, and no memory kept."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._limit = max(_ACCELERATOR_ELEMENTS // rows, 4096)
        self._device = device

    def dots(self, rows: Rows, part: Part) -> Floats:
        count = len(rows)
        found = torch.zeros(len(part.layers), count, count, dtype=torch.float64, device=self._device)
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            if block.last - block.first == 1:
                found[block.first] += wide @ wide.T
                continue
            lengths = torch.from_numpy(block.sizes).to(self._device)
            for row in range(count):
                for other in range(row, count):
                    sums = torch.segment_reduce(wide[row] * wide[other], "sum", lengths=lengths)
                    found[block.first : block.last, row, other] += sums
                    if other > row:
                        found[block.first : block.last, other, row] += sums
        values: Floats = found.cpu().numpy()
        return values

    def weighted_sum(self, rows: Rows, part: Part, weights: Floats, out: Tensor) -> None:
        factors = torch.from_numpy(np.ascontiguousarray(weights)).to(self._device)
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            lengths = torch.from_numpy(block.sizes).to(self._device)
            if block.last - block.first == 1:
                wide.mul_(factors[block.first, :, None])
            else:
                wide.mul_(torch.repeat_interleave(factors[block.first : block.last], lengths, dim=0).T)
            out[block.start : block.stop].copy_(wide.sum(dim=0))

    def _widened(self, rows: Rows, block: Block) -> Tensor:
        return torch.stack([row[block.start : block.stop].double() for row in rows])
