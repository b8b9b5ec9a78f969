"""Squared norms of gradients: one read, summed in float64, right for half precision and tiny values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

SqrNorm = float | Tensor  # a float for tensors on the CPU; elsewhere a 0-dim float64 tensor, so that nothing waits

_CHUNK = 65_536  # elements; one flat float32 dot over 25M of them errs by 1e-4, chunks of 64K by 1e-7
_SAFE_MIN, _SAFE_MAX = 1e-30, 1e36  # float32 squares outside of these have lost digits or overflowed


def sqr_norm(tensor: Tensor) -> SqrNorm:
    """Return the squared 2-norm of any floating or complex tensor; never waits for an accelerator."""
    flat = _elements(tensor).reshape(-1)
    if flat.device.type != "cpu":
        # Reductions on accelerators are trees, and vector_norm widens half precision on the fly.
        wide = torch.float32 if flat.dtype in (torch.float16, torch.bfloat16) else None
        norm: Tensor = torch.linalg.vector_norm(flat, dtype=wide)
        return norm.double().square()
    if flat.numel() <= _CHUNK:
        return _cpu_sqr_norm(flat)
    return sum(_cpu_sqr_norm(chunk) for chunk in torch.split(flat, _CHUNK))


def sqr_norm_then_scale_(flat: Tensor, weight: SqrNorm) -> SqrNorm:
    """Return the squared norm of a flat tensor and multiply it by `weight`, in one pass through memory."""
    if isinstance(weight, float) and weight == 1.0:
        return sqr_norm(flat)
    if flat.device.type != "cpu" or flat.is_sparse:
        norm = sqr_norm(flat)
        flat.mul_(weight)
        return norm
    total = 0.0
    for chunk in (flat,) if flat.numel() <= _CHUNK else torch.split(flat, _CHUNK):  # stays in the cache between the two
        total += _cpu_sqr_norm(chunk)
        chunk.mul_(weight)
    return total


def finite_mark(tensor: Tensor) -> SqrNorm:
    """Return 0.0 where every element is finite, NaN where one is not; never waits for an accelerator."""
    elements = _elements(tensor)
    if elements.device.type != "cpu":
        return elements.sum(dtype=torch.float64) * 0.0
    total = elements.sum(dtype=torch.float64 if elements.dtype == torch.float64 else torch.float32)
    # The sum itself can overflow; then the elements decide.
    return 0.0 if math.isfinite(float(total)) or bool(elements.isfinite().all()) else math.nan


def sum_sqr_norms(norms: Iterable[SqrNorm]) -> SqrNorm:
    """Add squared norms in float64, in the order given; tensors meet on the first one's device."""
    total: SqrNorm = 0.0
    for norm in norms:
        if isinstance(norm, Tensor) and isinstance(total, Tensor):
            norm = norm.to(total.device)
        total = total + norm
    return total


def _elements(tensor: Tensor) -> Tensor:
    """The real numbers that a gradient consists of, without a graph."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _cpu_sqr_norm(chunk: Tensor) -> float:
    if chunk.dtype in (torch.float32, torch.float64):
        value = float(torch.dot(chunk, chunk))
        if _SAFE_MIN < value < _SAFE_MAX or chunk.dtype == torch.float64 or math.isnan(value):
            return value
    # Half precision, whose coarse values make float32 sums drift; or all zero, tiny, or huge values.
    wide = chunk.double()
    return float(torch.dot(wide, wide))
