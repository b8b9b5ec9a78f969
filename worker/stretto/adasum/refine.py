"""The tree on the gradients themselves, for the few layers whose Gram matrix does not say enough.

Where gradients cancel to almost nothing, the norm of what is left over is lost in the rounding of the Gram matrix;
and squares of float64 values above 1e154 overflow. Then each level is computed from vectors, with a small sum over the
ranks per level.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from stretto.adasum.kernels import Rows
from stretto.adasum.segments import Part
from stretto.adasum.transport import Sums
from stretto.adasum.tree import (
    ROUNDING,
    SMALLEST_SQR_NORM,
    Floats,
    Indices,
    Leaves,
    Level,
    coefficients,
    leaf_counts,
    leaf_weights,
    levels,
    merged_counts,
)


def refine(rows: Rows, part: Part, layers: Indices, leaves: Leaves, sums: Sums, out: Tensor) -> Floats:
    """Overwrite these layers' elements in `out`, this rank's shard; returns |adasum|^2 of each layer.

    Every rank calls this with the same layers, whether or not its shard has elements of them.
    """
    where = {int(layer): index for index, layer in enumerate(part.layers)}
    places = [_place(part, where.get(int(layer))) for layer in layers]
    wide = [np.stack([row[place].double().cpu().numpy() for row in rows]) for place in places]
    powers = _powers(wide, sums)
    first = leaf_weights(leaves, sums.world_size)
    with np.errstate(all="ignore"):
        nodes = [first @ np.ldexp(each, -power) for each, power in zip(wide, powers, strict=True)]
    counts = leaf_counts(leaves)
    # [layers, nodes]: of the gradients that each is made of, added up; not known before a node is combined.
    lengths = np.full((len(layers), len(leaves)), np.nan)
    with np.errstate(all="ignore"):
        smallest = np.ldexp(SMALLEST_SQR_NORM, -2 * powers)
        for level in levels(len(leaves)):
            pairs = tuple(members for members in level if len(members) == 2)
            dots = np.stack([_dots(each, pairs) for each in nodes])
            sums.sum_(dots)
            norms = np.sqrt(dots[:, :, 1:])  # [layers, pairs, 2]
            known = lengths[:, np.array(pairs)]
            longest = np.where(np.isnan(known), norms, known)
            floors = np.maximum(smallest[:, None, None], (ROUNDING * longest) ** 2)
            factors = _factors(dots, counts, pairs, floors)
            lengths = _merged(lengths, level, np.sum(np.abs(factors) * longest, axis=2))
            nodes = [_combined(each, level, factors[layer]) for layer, each in enumerate(nodes)]
            counts = merged_counts(counts, level)
        results = [np.ldexp(each[0], power) for each, power in zip(nodes, powers, strict=True)]
        squares = np.array([_dot(each, each) for each in results])
    sums.sum_(squares)
    for place, result in zip(places, results, strict=True):
        out[place] = out.new_tensor(result)
    return squares


def _place(part: Part, index: int | None) -> slice:
    """Where a layer is in this rank's shard."""
    return slice(0, 0) if index is None else slice(int(part.bounds[index]), int(part.bounds[index + 1]))


def _powers(wide: list[Floats], sums: Sums) -> Indices:
    """Per layer the power of two above its largest magnitude on any rank; 0 where that is no finite number."""
    largest = np.array([np.abs(each).max(initial=0.0) for each in wide])
    sums.start_max(largest)()
    _, powers = np.frexp(largest)
    return np.where(np.isfinite(largest), powers, 0).astype(np.int64)


def _factors(dots: Floats, counts: Floats, pairs: Level, floors: Floats) -> Floats:
    """[layers, pairs, 2]"""
    first, second = np.array(pairs).T
    both = coefficients(
        dots[..., 0],
        dots[..., 1],
        dots[..., 2],
        counts[first],
        counts[second],
        smallest=(floors[..., 0], floors[..., 1]),
    )
    return np.stack(both, axis=2)


def _combined(nodes: Floats, level: Level, factors: Floats) -> Floats:
    """[nodes of this level, elements]"""
    rows, pair = [], 0
    for members in level:
        if len(members) == 1:
            rows.append(nodes[members[0]])
            continue
        rows.append(factors[pair, 0] * nodes[members[0]] + factors[pair, 1] * nodes[members[1]])
        pair += 1
    return np.stack(rows)


def _merged(lengths: Floats, level: Level, of_pairs: Floats) -> Floats:
    """[layers, nodes of this level]"""
    columns, pair = [], 0
    for members in level:
        columns.append(of_pairs[:, pair] if len(members) == 2 else lengths[:, members[0]])
        pair += len(members) == 2
    return np.stack(columns, axis=1)


def _dots(nodes: Floats, pairs: Level) -> Floats:
    """[pairs, 3]: a.b, |a|^2, |b|^2 over this rank's elements."""
    return np.array([
        [_dot(nodes[a], nodes[b]), _dot(nodes[a], nodes[a]), _dot(nodes[b], nodes[b])] for a, b in pairs
    ])  # fmt: skip


def _dot(a: Floats, b: Floats) -> float:
    """In an order that no processor changes, as BLAS' is not."""
    return float(np.add.reduce(a * b))
