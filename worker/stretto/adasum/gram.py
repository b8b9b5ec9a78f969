"""Adasum by Gram matrices: three collectives for any number of ranks.

Each rank gets its shard of everybody's gradients; the layers' Gram matrices are added up; every rank runs the tree on
vectors of factors, combines its shard, and gives it to all. The result is linear in the gradients, so nothing else of
them is needed. Each rank sends 2N(n-1)/n elements and the Gram matrices.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.memory import Memory
from stretto.adasum.refine import refine
from stretto.adasum.segments import Indices, Part, Segments, shard_bounds
from stretto.adasum.statistics import Statistics
from stretto.adasum.transport import Transport
from stretto.adasum.tree import Floats, Leaves, rank_weights

# Of layers in float64; others are rounded to more than this at the end.
_ALLOWED_ERROR = {torch.float64: 1e-12}


def reduce_by_gram(
    flat: Tensor, segments: Segments, leaves: Leaves, transport: Transport, memory: Memory
) -> Statistics:
    """Overwrite `flat` [elements] with the Adasum of all ranks' vectors; `segments`: its layers."""
    count = transport.world_size
    bounds = shard_bounds(segments.total, count)
    start, stop = bounds[transport.rank], bounds[transport.rank + 1]
    received = memory.take("received", count * (stop - start), flat)
    transport.scatter(received, flat, bounds)
    rows, part, mine = received.view(count, stop - start), segments.part(start, stop), flat[start:stop]
    kernel = memory.kernel(count, flat.device)
    grams = _summed(kernel.dots(rows, part), part, len(segments), transport)
    weights, result, marked = rank_weights(grams, leaves, _ALLOWED_ERROR.get(flat.dtype, 1e-6))
    kernel.weighted_sum(rows, part, weights[part.layers], mine)
    if marked.any():
        result[marked] = refine(rows, part, np.flatnonzero(marked), leaves, transport, mine)
    transport.share(flat, bounds)
    squares = np.trace(grams, axis1=1, axis2=2)
    return Statistics(squares, np.maximum(result, 0.0), float(grams.sum()) / count**2)


def _summed(dots: Floats, part: Part, layers: int, transport: Transport) -> Floats:
    """[layers, ranks, ranks] over all shards; only one of two symmetric values travels."""
    count = transport.world_size
    upper = _upper(count)
    packed = np.zeros((layers, len(upper[0])))
    packed[part.layers] = dots[:, upper[0], upper[1]]
    transport.sum_(packed)
    grams = np.empty((layers, count, count))
    grams[:, upper[0], upper[1]] = packed
    grams[:, upper[1], upper[0]] = packed
    return grams


@cache
def _upper(count: int) -> tuple[Indices, Indices]:
    """Rows and columns of a matrix's upper half."""
    rows, columns = np.triu_indices(count)
    return rows, columns
