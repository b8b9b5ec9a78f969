"""Adasum as the paper writes it, in one process and in float64: the measure of the distributed algorithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.checks import check_gradient
from stretto.adasum.tree import ROUNDING, SMALLEST_SQR_NORM, coefficients, levels


@torch.no_grad()
def pair(a: Tensor, b: Tensor, leaves_a: int = 1, leaves_b: int = 1) -> Tensor:
    """Adasum of two gradients of one layer: orthogonal ones add, parallel ones average.

    a, b: the same shape, floating dtype and device; the result has them too, computed in float64. `leaves_*`: how many
    gradients each is made of; parallel ones are averaged with these weights.
    """
    for name, tensor in (("a", a), ("b", b)):
        check_gradient(name, tensor)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            f"a is {tuple(a.shape)} {a.dtype} on {a.device}, b is {tuple(b.shape)} {b.dtype} on {b.device}; "
            "allowed: the same shape, dtype and device"
        )
    for name, leaves in (("leaves_a", leaves_a), ("leaves_b", leaves_b)):
        if isinstance(leaves, bool) or not isinstance(leaves, int) or leaves < 1:
            raise ValueError(f"{name} is {leaves!r}; allowed: whole numbers from 1")
    return _pair(_Node(a.detach().double(), leaves_a), _Node(b.detach().double(), leaves_b)).value.to(a.dtype)


@torch.no_grad()
def combine(tensors_by_rank: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Adasum of all ranks' gradients, per layer, in one process: the reference. Any number of ranks.

    tensors_by_rank: one list of tensors per rank, alike in number, shapes and dtypes. Results are of these dtypes,
    computed in float64 and rounded once.
    """
    if not tensors_by_rank:
        raise ValueError("tensors_by_rank is empty; give one list of tensors for each rank, at least one")
    first = tensors_by_rank[0]
    for rank, tensors in enumerate(tensors_by_rank):
        if len(tensors) != len(first):
            raise ValueError(f"rank {rank} has {len(tensors)} tensors and rank 0 has {len(first)}; give equally many")
        for layer, tensor in enumerate(tensors):
            check_gradient(f"tensor {layer} of rank {rank}", tensor)
            if (tensor.shape, tensor.dtype) != (first[layer].shape, first[layer].dtype):
                raise ValueError(
                    f"tensor {layer} is {tuple(tensor.shape)} {tensor.dtype} on rank {rank} and "
                    f"{tuple(first[layer].shape)} {first[layer].dtype} on rank 0; give the same shape and dtype"
                )
    return [_combined([tensors[layer] for tensors in tensors_by_rank]) for layer in range(len(first))]


@dataclass(frozen=True)
class _Node:
    """A float64 vector, and how many gradients it is made of.

    `parts_length`: their lengths added up, in units of 2^64, so that the largest ones have a sum too; None for one
    gradient.
    """

    value: Tensor
    leaves: int = 1
    parts_length: float | None = None


def _combined(tensors: Sequence[Tensor]) -> Tensor:
    """Adasum of one layer."""
    nodes = [_Node(tensor.detach().double()) for tensor in tensors]
    for level in levels(len(nodes)):
        nodes = [
            nodes[members[0]] if len(members) == 1 else _pair(nodes[members[0]], nodes[members[1]]) for members in level
        ]
    return nodes[0].value.to(tensors[0].dtype, copy=True)


def _pair(first: _Node, second: _Node) -> _Node:
    a, b = first.value, second.value
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    power_a = power_b = 0
    dots = _dots(flat_a, flat_b)
    if not all(map(math.isfinite, dots)):
        # Squares above the largest number: with powers of two taken out, only truly infinite values remain so.
        power_a, power_b = _power(flat_a), _power(flat_b)
        dots = _dots(_scaled(flat_a, power_a), _scaled(flat_b, power_b))
    lengths, floors = [], []
    for node, sqr, power in ((first, dots[1], power_a), (second, dots[2], power_b)):
        lengths.append(_ldexp(math.sqrt(sqr), power - 64) if node.parts_length is None else node.parts_length)
        floors.append(max(SMALLEST_SQR_NORM, (ROUNDING * _ldexp(lengths[-1], 64 - power)) ** 2))
    dot, sqr_a, sqr_b = (np.array([value]) for value in dots)
    found = coefficients(dot, sqr_a, sqr_b, float(first.leaves), float(second.leaves), smallest=(floors[0], floors[1]))
    of_a, of_b = (float(value[0]) for value in found)
    if power_a != power_b:
        of_a, of_b = 1.0 - _ldexp(1.0 - of_a, power_b - power_a), 1.0 - _ldexp(1.0 - of_b, power_a - power_b)
    length = abs(of_a) * lengths[0] + abs(of_b) * lengths[1]
    return _Node(of_a * a + of_b * b, first.leaves + second.leaves, length)


def _dots(a: Tensor, b: Tensor) -> list[float]:
    """a.b, |a|^2, |b|^2"""
    return [float(torch.dot(*both)) for both in ((a, b), (a, a), (b, b))]


def _scaled(values: Tensor, power: int) -> Tensor:
    return torch.ldexp(values, torch.tensor(-power))


def _power(values: Tensor) -> int:
    """The power of two just above the largest magnitude; 0 where that is zero or not finite."""
    return int(torch.frexp(values.abs().max()).exponent)


def _ldexp(value: float, power: int) -> float:
    """Infinite where that is too large."""
    return float(np.ldexp(value, power))
