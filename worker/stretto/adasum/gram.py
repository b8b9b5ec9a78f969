"""Adasum by Gram matrices: three collectives for any number of ranks.

Each rank gets its shard of everybody's gradients; the layers' Gram matrices are added up; every rank runs the tree on
vectors of factors, combines its shard, and gives it to all. The result is linear in the gradients, so nothing else of
them is needed. Each rank sends 2N(n-1)/n elements and the Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.kernels import ADDED_IN_ORDER
from stretto.adasum.memory import Memory
from stretto.adasum.refine import refine
from stretto.adasum.segments import Part, Segments, shard_bounds
from stretto.adasum.statistics import Statistics
from stretto.adasum.transport import Numbers, Sums, Transport
from stretto.adasum.tree import Floats, Leaves, rank_weights, upper

# Vectors that two ranks exchange whole.
_WHOLE_BYTES = 1 << 19
# Of layers in float64; others are rounded to more than this at the end.
_ALLOWED_ERROR = {torch.float64: 1e-12}


def reduce_by_gram(
    flat: Tensor, segments: Segments, leaves: Leaves, transport: Transport, memory: Memory
) -> Statistics:
    """Overwrite `flat` [elements] with the Adasum of all ranks' vectors; `segments`: its layers."""
    count = transport.world_size
    whole = _is_exchanged_whole(flat, segments, count)
    sums: Sums = Together(count) if whole else transport
    bounds = [0, segments.total] if whole else shard_bounds(segments.total, count)
    start, stop = (0, segments.total) if whole else (bounds[transport.rank], bounds[transport.rank + 1])
    received = memory.take("received", count * (stop - start), flat)
    rows, part, mine = received.view(count, stop - start), segments.part(start, stop), flat[start:stop]
    if whole:
        rows[transport.rank].copy_(flat)
        transport.share(received, [rank * segments.total for rank in range(count + 1)])
    else:
        transport.scatter(received, flat, bounds)
    kernel = memory.kernel(count, flat.device)
    grams = _summed(kernel.dots(rows, part), part, len(segments), sums)
    weights, result, marked = rank_weights(grams, leaves, _ALLOWED_ERROR.get(flat.dtype, 1e-6))
    kernel.weighted_sum(rows, part, weights[:, part.layers], mine)
    if marked.any():
        result[marked] = refine(rows, part, np.flatnonzero(marked), leaves, sums, mine)
    if not whole:
        transport.share(flat, bounds)
    with np.errstate(all="ignore"):
        return Statistics(grams.trace(), np.maximum(result, 0.0), float(grams.sum()) / count**2)


def _is_exchanged_whole(flat: Tensor, segments: Segments, count: int) -> bool:
    """Whether both of two ranks get everything and compute all of it, to the same bits: one exchange instead of three.

    What is sent is the same, N elements; for short vectors waiting takes longer than computing twice as much.
    """
    short = flat.numel() * flat.element_size() <= _WHOLE_BYTES and segments.longest <= ADDED_IN_ORDER
    return count == 2 and short and flat.device.type == "cpu"


class Together:
    """Every rank has all shards: its sums are the sums."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def sum_(self, numbers: Numbers) -> None: ...

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        return lambda: None


def _summed(dots: Floats, part: Part, layers: int, sums: Sums) -> Floats:
    """[ranks, ranks, layers] over all shards; only one of two symmetric values travels."""
    packed = np.zeros((len(dots), layers))
    packed[:, part.layers] = dots
    sums.sum_(packed)
    rows, columns = upper(sums.world_size)
    grams = np.empty((sums.world_size, sums.world_size, layers))
    grams[rows, columns] = packed
    grams[columns, rows] = packed
    return grams
