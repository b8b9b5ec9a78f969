"""Adasum as the paper writes it, in one process and in float64: the measure of the distributed algorithms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.checks import check_gradient
from stretto.adasum.tree import coefficients, levels


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
    return _pair(a.detach().double(), b.detach().double(), leaves_a, leaves_b).to(a.dtype)


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


def _combined(tensors: Sequence[Tensor]) -> Tensor:
    """Adasum of one layer."""
    nodes = [(tensor.detach().double(), 1) for tensor in tensors]
    for level in levels(len(nodes)):
        above = []
        for members in level:
            value, leaves = nodes[members[0]]
            if len(members) == 2:
                other, more = nodes[members[1]]
                value, leaves = _pair(value, other, leaves, more), leaves + more
            above.append((value, leaves))
        nodes = above
    return nodes[0][0].to(tensors[0].dtype, copy=True)


def _pair(a: Tensor, b: Tensor, leaves_a: int, leaves_b: int) -> Tensor:
    """Of float64 tensors."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    dots = [float(torch.dot(*both)) for both in ((flat_a, flat_b), (flat_a, flat_a), (flat_b, flat_b))]
    ratio = 0
    if not all(map(math.isfinite, dots)):
        # Squares above the largest number: with powers of two taken out, only truly infinite values remain so.
        power_a, power_b = _power(flat_a), _power(flat_b)
        flat_a, flat_b, ratio = torch.ldexp(flat_a, -power_a), torch.ldexp(flat_b, -power_b), int(power_b - power_a)
        dots = [float(torch.dot(*both)) for both in ((flat_a, flat_b), (flat_a, flat_a), (flat_b, flat_b))]
    dot, sqr_a, sqr_b = (np.array([value]) for value in dots)
    of_a, of_b = coefficients(dot, sqr_a, sqr_b, float(leaves_a), float(leaves_b))
    if ratio:
        of_a, of_b = 1.0 - np.ldexp(1.0 - of_a, ratio), 1.0 - np.ldexp(1.0 - of_b, -ratio)
    return float(of_a[0]) * a + float(of_b[0]) * b


def _power(values: Tensor) -> Tensor:
    """The power of two just above the largest magnitude; 0 where that is zero or not finite."""
    return torch.frexp(values.abs().max()).exponent
