"""Adasum's tree for any number of leaves: who is combined with whom, and with which coefficients (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

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
    """[nodes of the level]"""
    return np.array([sum(counts[index] for index in members) for members in level])


@cache
def upper(count: int) -> tuple[Indices, Indices]:
    """Rows and columns of a symmetric matrix's upper half, in the order in which its values are packed."""
    rows, columns = np.triu_indices(count)
    return rows, columns


def rank_weights(grams: Floats, leaves: Leaves, allowed_error: float = 1e-6) -> tuple[Floats, Floats, Bools]:
    """[ranks, layers]: the factor of each rank's gradient in the result; its squared norm; what has to be done again.

    `grams` [ranks, ranks, layers]: the dot products of the ranks' gradients. The tree is run on vectors of factors,
    whose norms and dot products follow from the Gram matrix: exact to about 1e-15 of the parts. Where parts cancelled
    so far that the result's relative error may be larger than `allowed_error`, or squares overflowed, it is marked.
    Elementwise, so that processors of different makes find the same bits.
    """
    counts = leaf_counts(leaves)
    with np.errstate(all="ignore"):
        lengths = np.sqrt(_diagonal(grams))
        marked: Bools = np.asarray(~np.isfinite(lengths).all(axis=0))
        parts, inner = np.eye(len(grams))[:, :, None], grams
        if leaves != single_ranks(len(grams)):
            means = leaf_weights(leaves, len(grams))
            parts = means[:, :, None]
            inner = np.einsum("ar,rsl,bs->abl", means, grams, means)
            lengths = means @ lengths
        errors = _Errors(lengths, allowed_error)
        for level in levels(len(leaves)):
            step = _Step.of(inner, level, counts)
            counts = merged_counts(counts, level)
            parts = step.applied(parts)
            below, inner = inner, step.applied(step.applied(inner).swapaxes(0, 1))
            marked = np.asarray(marked | errors.after(step, below, inner))
    return np.broadcast_to(parts[0], grams.shape[1:]), inner[0, 0], marked


@dataclass(frozen=True)
class _Step:
    """One level: the first nodes below are taken in pairs, with these factors [pairs, layers]; others stay."""

    of_first: Floats
    of_second: Floats

    @staticmethod
    def of(inner: Floats, level: Level, counts: Floats) -> _Step:
        end = 2 * sum(len(members) == 2 for members in level)
        squares, dots = _diagonal(inner), inner.diagonal(1).T
        both = coefficients(
            dots[:end:2], squares[:end:2], squares[1:end:2], counts[:end:2, None], counts[1:end:2, None]
        )
        return _Step(*both)

    def paired(self, rows: Floats) -> tuple[Floats, Floats]:
        """The first nodes of the pairs, and the second ones."""
        end = 2 * len(self.of_first)
        return rows[:end:2], rows[1:end:2]

    def applied(self, rows: Floats) -> Floats:
        """[nodes of this level, ...] of [nodes below, ..., layers]."""
        first, second = self.paired(rows)
        of_first, of_second = self.of_first, self.of_second
        if rows.ndim == 3:
            of_first, of_second = of_first[:, None], of_second[:, None]
        found: Floats = of_first * first
        found += of_second * second
        rest = rows[2 * len(found) :]
        if not len(rest):
            return found
        return np.concatenate([found, np.broadcast_to(rest, (*rest.shape[:-1], found.shape[-1]))])


def _diagonal(matrices: Floats) -> Floats:
    """[nodes, layers] of [nodes, nodes, layers]."""
    return matrices.diagonal().T


class _Errors:
    """How far each node's vector may be off, level by level, where that can matter at all."""

    def __init__(self, lengths: Floats, allowed: float) -> None:
        self._allowed = allowed
        self._lengths = lengths  # [nodes, layers]: of the parts that each is made of, added up
        self._errors = np.zeros_like(lengths)
        self._clear = True

    def after(self, step: _Step, below: Floats, inner: Floats) -> Bools | bool:
        """[layers]: whether a node of this level is off by more than is allowed, relative to its length."""
        sizes = _Step(np.abs(step.of_first), np.abs(step.of_second))
        longest, squares = self._lengths, _diagonal(inner)
        self._lengths = above = sizes.applied(longest)
        above_sqr = above * above
        if self._clear and (squares >= _CLEAR * above_sqr).all():
            self._errors = np.zeros_like(above)
            return False
        self._clear = False
        norms = np.sqrt(_diagonal(below))
        off = np.divide(self._errors, norms, out=np.zeros_like(norms), where=self._errors > 0)
        ratios = np.divide(longest, norms, out=np.zeros_like(norms), where=norms > 0)
        # What errors of a's and b's dot products do to the length of factor times a, and of factor times b.
        of_factors = np.zeros_like(step.of_first)
        for a, b in ((0, 1), (1, 0)):
            ratio, norm = step.paired(ratios)[a], step.paired(norms)[b]
            of_factors += _DOT_ERROR * (step.paired(longest)[b] * ratio + norm * ratio**2)
            of_factors += 2.0 * norm * step.paired(off)[a]
        errors = sizes.applied(self._errors) + _DOT_ERROR * above
        errors[: len(of_factors)] += of_factors
        self._errors = errors
        good = errors**2 <= self._allowed**2 * (squares - 4 * _DOT_ERROR * above_sqr)
        return ~np.asarray(good.all(axis=0))
