"""Adasum's tree for any number of leaves: who is combined with whom, and with which coefficients (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# The ranks of each leaf, whose mean it is: one rank, or those of one node.
Leaves = tuple[tuple[int, ...], ...]

# Of one level: the nodes of the level below that make up each node, one or two of them.
Level = tuple[tuple[int, ...], ...]

# sqrt(DBL_MIN): below it a squared norm is no divisor any more, and the coefficient is 1.
SMALLEST_SQR_NORM = float(np.sqrt(np.finfo(np.float64).tiny))

# What is left over of parts that are so much longer is rounding: it counts as zero, and its coefficient is 1.
ROUNDING = 2.0**-48

# Of dot products in float64, relative to the vectors' lengths.
_DOT_ERROR = 1e-15
# A squared norm that is a larger part of its parts' than this has lost nothing worth looking after.
_CLEAR = 1e-3


def single_ranks(world_size: int) -> Leaves:
    """Every rank is a leaf, in the order of the ranks."""
    return tuple((rank,) for rank in range(world_size))


@cache
def levels(leaves: int) -> tuple[Level, ...]:
    """From the leaves to the root. Powers of two: a balanced tree of neighbours, which is Horovod's order.

    Any other number is brought to the power of two below it by pairing as many of the first ones as are too many.
    """
    slots = 1 << (leaves.bit_length() - 1)
    surplus = leaves - slots
    found: list[Level] = []
    if surplus:
        pairs = tuple((2 * index, 2 * index + 1) for index in range(surplus))
        found.append(pairs + tuple((index,) for index in range(2 * surplus, leaves)))
    while slots > 1:
        slots //= 2
        found.append(tuple((2 * index, 2 * index + 1) for index in range(slots)))
    return tuple(found)


def coefficients(
    dots: Floats,
    sqr_a: Floats,
    sqr_b: Floats,
    leaves_a: Floats | float,
    leaves_b: Floats | float,
    *,
    smallest: tuple[Floats | float, Floats | float] = (SMALLEST_SQR_NORM, SMALLEST_SQR_NORM),
) -> tuple[Floats, Floats]:
    """The factors of a and b in adasum(a, b), elementwise; `leaves_*`: how many gradients each stands for.

    With equally many leaves it is the paper's formula (Maleki et al. 2020, equation 2). A coefficient is 1 where the
    squared norm is below the smallest that is a divisor, of a and of b.
    """
    with np.errstate(all="ignore"):
        of_a = dots / np.where(sqr_a < smallest[0], np.inf, sqr_a)
        of_b = dots / np.where(sqr_b < smallest[1], np.inf, sqr_b)
        share = leaves_a / (leaves_a + leaves_b)
        return 1.0 - share * of_a, 1.0 - (1.0 - share) * of_b


def leaf_weights(leaves: Leaves, world_size: int) -> Floats:
    """[leaves, ranks]: each leaf as a mean of ranks."""
    weights = np.zeros((len(leaves), world_size))
    for index, ranks in enumerate(leaves):
        weights[index, list(ranks)] = 1.0 / len(ranks)
    return weights


def leaf_counts(leaves: Leaves) -> Floats:
    """[leaves]: the gradients that each stands for, so that parallel ones give the mean over all ranks."""
    return np.array([len(ranks) for ranks in leaves], dtype=np.float64)


def merged_counts(counts: Floats, level: Level) -> Floats:
    return np.array([sum(counts[index] for index in members) for members in level])


def rank_weights(grams: Floats, leaves: Leaves, allowed_error: float = 1e-6) -> tuple[Floats, Floats, Bools]:
    """[layers, ranks]: the factor of each rank's gradient in the result; its squared norm; what has to be done again.

    `grams` [layers, ranks, ranks]: the dot products of the ranks' gradients. The tree is run on vectors of factors,
    whose norms and dot products follow from the Gram matrix: exact to about 1e-15 of the parts. Where parts cancelled
    so far that the result's relative error may be larger than `allowed_error`, or squares overflowed, it is marked.
    """
    layers, world_size, _ = grams.shape
    counts = leaf_counts(leaves)
    parts = np.broadcast_to(leaf_weights(leaves, world_size), (layers, len(leaves), world_size))
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.diagonal(grams, axis1=1, axis2=2))[:, :, None]
        inner = grams if leaves == single_ranks(world_size) else parts @ grams @ parts.transpose(0, 2, 1)
        marked = ~np.isfinite(lengths).all(axis=(1, 2))
        errors = _Errors(inner, np.abs(parts) @ lengths, allowed_error)
        for level in levels(len(leaves)):
            step = _step_weights(inner, level, counts)
            counts = merged_counts(counts, level)
            parts = step @ parts
            below, inner = inner, step @ inner @ step.transpose(0, 2, 1)
            marked |= errors.after(level, step, below, inner, np.abs(parts) @ lengths)
    weights: Floats = parts[:, 0, :]
    return weights, inner[:, 0, 0], marked


class _Errors:
    """How far each node's vector may be off, level by level, where that can matter at all."""

    def __init__(self, inner: Floats, lengths: Floats, allowed: float) -> None:
        self._allowed = allowed
        self._lengths = lengths[:, :, 0]  # [layers, nodes]: of the parts that each is made of, added up
        self._errors = np.zeros_like(self._lengths)
        self._clear = True

    def after(self, level: Level, step: Floats, below: Floats, inner: Floats, lengths: Floats) -> Bools | bool:
        """[layers]: whether a node of this level is off by more than is allowed, relative to its length."""
        longest, above = self._lengths, lengths[:, :, 0]
        squares = np.diagonal(inner, axis1=1, axis2=2)
        self._lengths = above
        if self._clear and (squares >= _CLEAR * above**2).all():
            self._errors = np.zeros_like(above)
            return False
        self._clear = False
        found = np.abs(step) @ self._errors[:, :, None]
        errors = found[:, :, 0] + _DOT_ERROR * above
        norms = np.sqrt(np.diagonal(below, axis1=1, axis2=2))
        off = np.divide(self._errors, norms, out=np.zeros_like(norms), where=self._errors > 0)
        for index, members in enumerate(level):
            if len(members) == 2:
                a, b = members
                errors[:, index] += _of_factor(norms, longest, off, a, b) + _of_factor(norms, longest, off, b, a)
        self._errors = errors
        surely = squares - 4 * _DOT_ERROR * above**2
        good = errors**2 <= self._allowed**2 * surely
        return ~np.asarray(good.all(axis=1))


def _of_factor(norms: Floats, longest: Floats, off: Floats, a: int, b: int) -> Floats:
    """What errors of a's and b's dot products do to the length of factor times a."""
    ratios = np.divide(longest, norms, out=np.zeros_like(norms), where=norms > 0)
    return _DOT_ERROR * (longest[:, b] * ratios[:, a] + norms[:, b] * ratios[:, a] ** 2) + 2 * norms[:, b] * off[:, a]


def _step_weights(inner: Floats, level: Level, counts: Floats) -> Floats:
    """[layers, nodes of this level, nodes below]."""
    weights = np.zeros((inner.shape[0], len(level), inner.shape[1]))
    single = [(index, members[0]) for index, members in enumerate(level) if len(members) == 1]
    double = [(index, *members) for index, members in enumerate(level) if len(members) == 2]
    for index, member in single:
        weights[:, index, member] = 1.0
    above, first, second = _columns(double)
    diagonal = np.diagonal(inner, axis1=1, axis2=2)
    of_first, of_second = coefficients(
        inner[:, first, second], diagonal[:, first], diagonal[:, second], counts[first], counts[second]
    )
    weights[:, above, first] = of_first
    weights[:, above, second] = of_second
    return weights


def _columns(rows: Sequence[tuple[int, ...]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]
