"""What Adasum accepts, and what the ranks make sure of together before they exchange anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
_TRAITS = ("number of tensors", "shapes", "dtypes", "devices", "algorithm")


class Exchange(Protocol):
    """What is needed of the ranks' connection."""

    rank: int
    world_size: int

    def sum_(self, numbers: npt.NDArray[np.int64]) -> None: ...

    def start_max(self, numbers: npt.NDArray[np.int64]) -> Callable[[], None]: ...


def check_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that Adasum cannot combine."""
    problem = problem_of(name, tensor)
    if problem:
        raise ValueError(problem)


def problem_of(name: str, tensor: Tensor) -> str:
    """What is wrong with it, or nothing."""
    if tensor.layout is not torch.strided:
        return (
            f"{name} is sparse ({tensor.layout}), which Adasum does not combine: make its gradient dense "
            "(Embedding(sparse=False)), or leave it out"
        )
    if tensor.dtype not in DTYPES:
        return f"{name} is {tensor.dtype}; allowed: {_NAMES}"
    return ""


@dataclass(frozen=True)
class Traits:
    """What has to be the same on all ranks: a number for each trait, and one for all."""

    each: npt.NDArray[np.int64]
    together: int


def digests(tensors: Sequence[Tensor], algorithm: str) -> Traits:
    """Numbers that are equal on two ranks where the traits are."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    dtypes = [str(tensor.dtype) for tensor in tensors]
    devices = sorted({tensor.device.type for tensor in tensors})
    rest = [_digest(shapes), _digest(dtypes), _digest(devices), _digest(algorithm)]
    each = [len(tensors), *rest]
    return Traits(np.array(each, dtype=np.int64), _digest(each))


def unknown() -> Traits:
    """Of a rank that has a problem of its own."""
    return Traits(np.zeros(len(_TRAITS), dtype=np.int64), 0)


def begin_agreement(exchange: Exchange, traits: Traits, problem: str) -> Callable[[], None]:
    """Start the one small all-reduce that compares the ranks' traits; call what is returned before anything else.

    That raises ValueError on every rank where they differ or one of them has a problem. The reason is asked for only
    then, in a second all-reduce.
    """
    flags = np.array([traits.together, -traits.together, int(bool(problem))], dtype=np.int64)
    compare = exchange.start_max(flags)

    def agree() -> None:
        compare()
        if flags[0] != -flags[1] or flags[2]:
            _raise_difference(exchange, traits.each, problem)

    return agree


def _raise_difference(exchange: Exchange, traits: npt.NDArray[np.int64], problem: str) -> NoReturn:
    rows = np.zeros((exchange.world_size, len(_TRAITS) + 1), dtype=np.int64)
    rows[exchange.rank] = [*traits, int(bool(problem))]
    exchange.sum_(rows)
    if problem:
        raise ValueError(problem)
    raise ValueError(_difference(rows))


def _difference(rows: npt.NDArray[np.int64]) -> str:
    """In words, the same on every rank."""
    refusing = np.flatnonzero(rows[:, -1])
    if len(refusing):
        ranks = ", ".join(map(str, refusing))
        return f"rank {ranks} cannot take part in this Adasum; its own error says why"
    for column, trait in enumerate(_TRAITS):
        values = rows[:, column]
        if (values != values[0]).any():
            others = ", ".join(map(str, np.flatnonzero(values != values[0])))
            counts = f" ({', '.join(map(str, values))} by rank)" if column == 0 else ""
            return (
                f"the ranks disagree on the {trait}{counts}: rank {others} differs from rank 0; every rank has to "
                "give the same tensors in the same order"
            )
    raise AssertionError("the ranks disagreed on nothing")


def _digest(value: object) -> int:
    """62 bits, so that its negative is a number too."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 2
