"""Adasum of gradients that cancel, at one level of the tree or at several, against decimal arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import adasum_oracle as oracle
import numpy as np
import pytest
import torch
from adasum_world import ThreadTransport, in_threads
from stretto import adasum
from stretto.adasum.reducer import Reducer
from torch import Tensor

ELEMENTS = 24
WORLDS = (2, 3, 4, 5, 7, 8, 11, 16)
ALGORITHMS: tuple[adasum.Algorithm, ...] = ("rvh", "gram")


def reduced(rows: Sequence[Tensor], algorithm: adasum.Algorithm) -> list[tuple[Tensor, int]]:
    """By rank: the result, and the elements that were sent."""

    def work(transport: ThreadTransport) -> tuple[Tensor, int]:
        mine = rows[transport.rank].clone()
        Reducer(transport, algorithm).reduce([mine])
        return mine, transport.sent

    return in_threads(len(rows), work)


def off_by(rows: Sequence[Tensor], size: float | None = None) -> dict[str, float]:
    """How far each way to combine the ranks' vectors is from the exact result, relative to it or to a `size`."""
    wanted = oracle.exact([row.double().numpy() for row in rows])
    size = size or float(np.linalg.norm(wanted))
    found = {"reference": adasum.combine([[row] for row in rows])[0]}
    for algorithm in ALGORITHMS:
        results = [result for result, _ in reduced(rows, algorithm)]
        assert all(torch.equal(each, results[0]) for each in results[1:]), algorithm
        found[algorithm] = results[0]
    return {name: float(np.linalg.norm(each.double().numpy() - wanted)) / size for name, each in found.items()}


def cancelling(world_size: int, group: int, left_over: float) -> list[Tensor]:
    """`group` neighbours have one direction, the next ones its opposite; `left_over` of each is its own."""
    draw = np.random.default_rng([world_size, group])
    shared, own = draw.normal(size=ELEMENTS), draw.normal(size=(world_size, ELEMENTS))
    signs = (-1.0) ** (np.arange(world_size) // group)
    return [torch.from_numpy(sign * shared + left_over * row).float() for sign, row in zip(signs, own, strict=True)]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_what_cancels_to_a_part_is_as_right_as_everything_else(world_size: int, group: int) -> None:
    for left_over in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        rows = cancelling(world_size, group, left_over)
        for name, error in off_by(rows).items():
            assert error < 1e-5, (name, left_over)


@pytest.mark.parametrize("world_size", [4, 5, 8, 16])
def test_what_cancels_at_one_level_after_the_other(world_size: int) -> None:
    draw = np.random.default_rng(world_size)
    first, second = draw.normal(size=(2, ELEMENTS))
    own = draw.normal(size=(world_size, ELEMENTS))
    ranks = np.arange(world_size)[:, None]
    for left_over in (1e-1, 1e-2, 1e-3):
        values = first * (-1.0) ** ranks + left_over * second * (-1.0) ** (ranks // 2) + left_over**2 * own
        for name, error in off_by([torch.from_numpy(row).float() for row in values]).items():
            assert error < 1e-5, (name, left_over)


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param((1.0, -1.0, 0.0, 0.0), id="two"),
        pytest.param((1.0, 1.0, -2.0, 0.0, 0.0, 0.0), id="two_against_one_of_twice_the_length"),
        pytest.param((1.0, 3.0, -2.0, -2.0, 0.0, 0.0, 0.0, 0.0), id="two_against_two"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_to_nothing_leaves_the_others_as_they_are(factors: tuple[float, ...], dtype: torch.dtype) -> None:
    """Rounding leaves 1e-16 of a vector there, whose direction would be taken for a gradient's."""
    draw = np.random.default_rng(len(factors))
    shared, own = draw.normal(size=ELEMENTS), draw.normal(size=(len(factors), ELEMENTS))
    shared = shared.astype(np.float16).astype(np.float64)  # so that its multiples are not rounded
    rows = [
        torch.from_numpy(factor * shared if factor else row).to(dtype) for factor, row in zip(factors, own, strict=True)
    ]
    assert max(off_by(rows).values()) < (1e-12 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_what_cancels_altogether_is_nothing(world_size: int) -> None:
    draw = torch.Generator().manual_seed(world_size)
    shared = torch.randn(ELEMENTS, generator=draw)
    rows = [shared * (-1.0) ** rank for rank in range(world_size)]
    assert max(off_by(rows, size=float(shared.norm())).values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("world_size", [4, 8])
def test_both_algorithms_agree_in_half_precision_where_levels_cancel(world_size: int, dtype: torch.dtype) -> None:
    for left_over in (1e-1, 1e-2):
        rows = [row.to(dtype) for row in cancelling(world_size, 2, left_over)]
        found = off_by(rows)
        step = torch.finfo(dtype).eps
        assert found["gram"] < step
        assert found["rvh"] < 6 * step


@pytest.mark.parametrize("world_size", [4, 8])
def test_only_layers_that_cancel_between_levels_are_sent_again(world_size: int) -> None:
    layer = 64 * world_size
    rows = [torch.randn(layer, generator=torch.Generator().manual_seed(rank)) for rank in range(world_size)]
    first = rows[0].clone()
    spoilt = [first * (-1.0) ** (rank // 2) + 1e-6 * row for rank, row in enumerate(rows)]

    def work(transport: ThreadTransport) -> int:
        mine = [rows[transport.rank].clone() for _ in range(7)] + [spoilt[transport.rank].clone()]
        Reducer(transport, "rvh").reduce(mine)
        return transport.sent

    least = 2 * layer * (world_size - 1) // world_size
    assert set(in_threads(world_size, work)) == {9 * least}
