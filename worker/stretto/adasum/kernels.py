"""Dot products and weighted sums per layer, in float64: blocks are widened one after the other in kept memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.segments import Block, Part
from stretto.adasum.tree import Floats, upper

# Vectors of one length: [rows, elements], or one tensor each.
Rows = Tensor | list[Tensor]

# Elements of one block over all rows: 1 MB in float64, which a core's own cache holds.
_BLOCK_ELEMENTS = 1 << 17
# So many elements of a layer are added up in an order that no processor changes.
ADDED_IN_ORDER = 1 << 13
# On an accelerator a block is as long as its launch is worth: 128 MB in float64.
_ACCELERATOR_ELEMENTS = 1 << 24


class Kernel(Protocol):
    """`rows`: one per gradient; `part`: the layers in them."""

    def dots(self, rows: Rows, part: Part) -> Floats:
        """[pairs of rows, layers of the part]: the dot products, in the order of `tree.upper`."""

    def weighted_sum(self, rows: Rows, part: Part, weights: Floats, out: Tensor) -> None:
        """Overwrite `out`, which may be one of the rows, with sum_i weights[i, layer] * rows[i].

        After `dots` of the same object, the rows have to be as they were.
        """


def kernel_for(rows: int, device: torch.device) -> Kernel:
    return CpuKernel(rows) if device.type == "cpu" else TorchKernel(rows, device)


class CpuKernel:
    """NumPy for many short layers in one block, BLAS for pieces of a long one."""

    def __init__(self, rows: int) -> None:
        self._limit = max(_BLOCK_ELEMENTS // rows, 4096)
        self._wide = torch.empty(rows, self._limit, dtype=torch.float64)
        self._products = torch.empty(rows, self._limit, dtype=torch.float64)
        self._sum = torch.empty(self._limit, dtype=torch.float64)
        self._holding: tuple[Rows, Block] | None = None

    @np.errstate(all="ignore")  # squares may overflow; what the sums become says so
    def dots(self, rows: Rows, part: Part) -> Floats:
        count = len(rows)
        found = np.zeros((count * (count + 1) // 2, len(part.layers)))
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            if block.last - block.first == 1 and block.stop - block.start > ADDED_IN_ORDER:
                found[:, block.first] += (wide @ wide.T).numpy()[upper(count)]
                continue
            values = wide.numpy()
            products = self._products[:, : block.stop - block.start].numpy()
            place = 0
            for row in range(count):
                np.multiply(values[row:], values[row], out=products[row:])
                sums = np.add.reduceat(products[row:], block.starts, axis=1)
                found[place : place + count - row, block.first : block.last] += sums
                place += count - row
        return found

    @np.errstate(all="ignore")
    def weighted_sum(self, rows: Rows, part: Part, weights: Floats, out: Tensor) -> None:
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            total = self._sum[: block.stop - block.start]
            if block.last - block.first == 1 and block.stop - block.start > ADDED_IN_ORDER:
                torch.mv(wide.T, torch.from_numpy(weights[:, block.first].copy()), out=total)
            else:
                values, sums = wide.numpy(), total.numpy()
                values *= np.repeat(weights[:, block.first : block.last], block.sizes, axis=1)
                # Twice as fast as one reduction over the rows.
                np.add(values[0], values[1] if len(values) > 1 else 0.0, out=sums)
                for row in values[2:]:
                    sums += row
            out[block.start : block.stop].copy_(total)
        self._holding = None

    def _widened(self, rows: Rows, block: Block) -> Tensor:
        """In kept memory, where a single block of a part still is after its dot products."""
        wide = self._wide[:, : block.stop - block.start]
        if self._holding is not None and self._holding[0] is rows and self._holding[1] is block:
            return wide
        self._holding = rows, block
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
        first, second = upper(len(rows))
        found = torch.zeros(len(first), len(part.layers), dtype=torch.float64, device=self._device)
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            if block.last - block.first == 1:
                found[:, block.first] += (wide @ wide.T)[first, second]
                continue
            lengths = torch.from_numpy(block.sizes).to(self._device)
            for place, (row, other) in enumerate(zip(first, second, strict=True)):
                sums = torch.segment_reduce(wide[row] * wide[other], "sum", lengths=lengths)
                found[place, block.first : block.last] += sums
        values: Floats = found.cpu().numpy()
        return values

    def weighted_sum(self, rows: Rows, part: Part, weights: Floats, out: Tensor) -> None:
        factors = torch.from_numpy(np.ascontiguousarray(weights)).to(self._device)
        for block in part.blocks(self._limit):
            wide = self._widened(rows, block)
            if block.last - block.first == 1:
                wide.mul_(factors[:, block.first, None])
            else:
                lengths = torch.from_numpy(block.sizes).to(self._device)
                wide.mul_(torch.repeat_interleave(factors[:, block.first : block.last], lengths, dim=1))
            out[block.start : block.stop].copy_(wide.sum(dim=0))

    def _widened(self, rows: Rows, block: Block) -> Tensor:
        return torch.stack([row[block.start : block.stop].double() for row in rows])
