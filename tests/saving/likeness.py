"""Equality of nested state, bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(a: Any, b: Any) -> bool:
    """Equality that sees types, NaN, signs of zero, dtypes and shapes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, float):
        return repr(a) == repr(b)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=False))
    return bool(a == b)
