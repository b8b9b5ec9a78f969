"""The learning rate of one step: scaled while the optimizer runs, restored exactly afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def scaled(param_groups: list[dict[str, Any]], factor: float) -> Iterator[None]:
    """Multiply every group's "lr" by `factor` inside the block, also where the block raises.

    A tensor learning rate (capturable, fused) keeps its identity, since captured graphs hold it; one tensor
    that several groups share is scaled once.
    """
    numbers = [(group, group["lr"]) for group in param_groups if not isinstance(group["lr"], Tensor)]
    tensors = {id(rate): (rate, rate.clone()) for rate in _tensor_rates(param_groups)}
    try:
        with torch.no_grad():
            for group, rate in numbers:
                group["lr"] = rate * factor
            for tensor, _ in tensors.values():
                tensor.mul_(factor)
        yield
    finally:
        for group, rate in numbers:
            group["lr"] = rate
        with torch.no_grad():
            for tensor, saved in tensors.values():
                tensor.copy_(saved)


def current(param_groups: list[dict[str, Any]]) -> list[float | Tensor]:
    """Return each group's learning rate; tensors as copies, so that reading them can wait."""
    return [g["lr"].clone() if isinstance(g["lr"], Tensor) else float(g["lr"]) for g in param_groups]


def _tensor_rates(param_groups: list[dict[str, Any]]) -> list[Tensor]:
    return [group["lr"] for group in param_groups if isinstance(group["lr"], Tensor)]
