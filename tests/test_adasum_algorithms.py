"""Adasum for 1 to 16 ranks: the reference, both algorithms and Horovod's formulas, against a naive tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import adasum_oracle as oracle
import numpy as np
import pytest
import torch
from adasum_world import ThreadTransport, in_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from stretto import adasum
from stretto.adasum.kernels import CpuKernel, TorchKernel
from stretto.adasum.reducer import Reducer
from stretto.adasum.segments import Segments
from stretto.adasum.statistics import Statistics
from stretto.adasum.tree import levels, upper
from torch import Tensor

SIZES = (7, 0, 1, 300, 2, 40)
WORLDS = range(1, 17)
ALGORITHMS: tuple[adasum.Algorithm, ...] = ("rvh", "gram")


def gradients(world_size: int, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[list[Tensor]]:
    """By rank and layer."""
    draw = torch.Generator().manual_seed(seed + world_size)
    rows: list[list[Tensor]] = [
        [torch.randn(size, generator=draw, dtype=torch.float64) for size in SIZES] for _ in range(world_size)
    ]
    for layer in range(len(SIZES)):
        first = rows[0][layer].clone()
        for rank, row in enumerate(rows):
            row[layer] = _of_kind(kind, row[layer], first, rank)
    return [[layer.to(dtype) for layer in row] for row in rows]


def _of_kind(kind: str, value: Tensor, first: Tensor, rank: int) -> Tensor:
    match kind:
        case "parallel":
            return first * (1.0 + rank)
        case "identical":
            return first.clone()
        case "zero":
            return value * (rank % 2)
        case "tiny":
            return value * 1e-36
        case "range":
            return value * 10.0 ** (-12 + 7 * (rank % 4))
        case "cancelling":
            return first * (-1.0) ** rank + 1e-3 * value if rank else value
    return value


def expected(rows: Sequence[Sequence[Tensor]]) -> list[np.ndarray[Any, Any]]:
    return [
        oracle.combine([row[layer].double().numpy() for row in rows]) if rows[0][layer].numel() else np.zeros(0)
        for layer in range(len(rows[0]))
    ]


def reduced(
    rows: Sequence[Sequence[Tensor]], algorithm: adasum.Algorithm, **options: Any
) -> tuple[list[list[Tensor]], list[Statistics], list[int]]:
    """Results, statistics and sent elements, by rank."""

    def work(transport: ThreadTransport) -> tuple[list[Tensor], Statistics, int]:
        mine = [tensor.clone() for tensor in rows[transport.rank]]
        found = Reducer(transport, algorithm, **options).reduce(mine)
        return mine, found, transport.sent

    results, statistics, sent = zip(*in_threads(len(rows), work), strict=True)
    return list(results), list(statistics), list(sent)


def relative(found: Tensor, wanted: np.ndarray[Any, Any]) -> float:
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found.double().numpy() - wanted)) / size if size else float(found.abs().sum())


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("kind", ["normal", "parallel", "identical", "zero", "tiny", "range", "cancelling"])
def test_both_algorithms_agree_with_a_naive_tree_and_are_the_same_bits_on_every_rank(
    world_size: int, kind: str
) -> None:
    rows = gradients(world_size, kind)
    wanted = expected(rows)
    for algorithm in ALGORITHMS:
        results, statistics, _ = reduced(rows, algorithm)
        # A vector of one or two elements cancels by chance; what is left over then has float32's error of the parts.
        for layer, tensor in enumerate(results[0]):
            limit = 1e-5 if tensor.numel() > 2 and kind != "cancelling" else 1e-4
            largest = max(float(row[layer].double().norm()) for row in rows)
            if float(np.linalg.norm(wanted[layer])) > 1e-3 * largest:
                assert relative(tensor, wanted[layer]) < limit, (algorithm, layer)
            else:
                assert float(np.abs(tensor.double().numpy() - wanted[layer]).max(initial=0)) <= 1e-6 * largest
        for other, found in zip(results[1:], statistics[1:], strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))
            np.testing.assert_array_equal(found.orthogonality, statistics[0].orthogonality)


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_reference_is_the_naive_tree(world_size: int) -> None:
    rows = gradients(world_size, "normal", torch.float64)
    for found, wanted in zip(adasum.combine(rows), expected(rows), strict=True):
        assert relative(found, wanted) < 1e-14


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_powers_of_two_give_horovods_result(world_size: int) -> None:
    rows = gradients(world_size, "normal", torch.float64)
    for found, layer in zip(adasum.combine(rows), range(len(SIZES)), strict=True):
        assert relative(found, oracle.horovod([row[layer].numpy() for row in rows])) < 1e-14


@settings(max_examples=60, deadline=None)
@given(world_size=st.integers(1, 16), size=st.integers(1, 40), seed=st.integers(0, 10**6), data=st.data())
def test_identical_orthogonal_and_parallel_gradients(
    world_size: int, size: int, seed: int, data: st.DataObject
) -> None:
    draw = np.random.default_rng(seed)
    one = draw.normal(size=size)
    factors = np.array(data.draw(st.lists(st.floats(0.1, 10.0), min_size=world_size, max_size=world_size)))
    basis = np.linalg.qr(draw.normal(size=(size + world_size, world_size)))[0].T * factors[:, None]
    for rows, wanted in (
        (np.tile(one, (world_size, 1)), one),
        (factors[:, None] * one, factors.mean() * one),
        (basis, basis.sum(axis=0)),
    ):
        tensors = [[torch.from_numpy(row.copy())] for row in rows]
        found = adasum.combine(tensors)[0].numpy()
        assert np.linalg.norm(found - wanted) <= 2e-14 * np.linalg.norm(wanted)
        for algorithm in ALGORITHMS:
            distributed = reduced(tensors, algorithm)[0][0][0].numpy()
            assert np.linalg.norm(distributed - wanted) <= 2e-14 * np.linalg.norm(wanted)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_no_rank_sends_more_than_it_has_to(world_size: int) -> None:
    elements = 16 * 45 * 7 * 11  # a multiple of every number of shards
    rows = [[torch.randn(elements)] for _ in range(world_size)]
    least = 2 * elements * (world_size - 1) // world_size
    assert set(reduced(rows, "gram")[2]) == {least}
    sent = reduced(rows, "rvh")[2]
    power_of_two = world_size & (world_size - 1) == 0
    assert set(sent) == {least} if power_of_two else max(sent) <= 2.0 * elements


def test_horovods_stability_from_tiny_to_the_root_of_the_largest_number() -> None:
    draw = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        for size in (info.tiny, info.tiny**0.5, 1.0, info.max**0.5 / 64, info.max / 64):
            rows = [[torch.randn(1024, generator=draw, dtype=torch.float64).mul_(size).to(dtype)] for _ in range(4)]
            scale = 1.0 / size
            # The naive tree squares, so it is given numbers that it can square; but not below the smallest norm.
            below = size < 1e-150
            wanted = (
                sum(row[0].double().numpy() * scale for row in rows)
                if below
                else oracle.combine([row[0].double().numpy() * scale for row in rows])
            )
            found = [adasum.combine(rows)[0]]
            found += [reduced(rows, algorithm)[0][0][0] for algorithm in ALGORITHMS]
            for each in found:
                assert torch.isfinite(each).all()
                assert np.linalg.norm(each.double().numpy() * scale - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_zeros_leave_the_other_gradient_and_zeros_alone_stay_zeros() -> None:
    a = torch.randn(5)
    assert torch.equal(adasum.pair(a, torch.zeros(5)), a)
    assert torch.equal(adasum.pair(torch.zeros(5), torch.zeros(5)), torch.zeros(5))


def test_what_cancels_to_rounding_does_not_spoil_the_rest() -> None:
    """Ranks 0 and 1 cancel to 1e-7 of their lengths: the Gram matrix cannot tell how long the rest is."""
    draw = torch.Generator().manual_seed(3)
    big = torch.randn(500, generator=draw, dtype=torch.float64)
    small = [torch.randn(500, generator=draw, dtype=torch.float64) * 1e-7 for _ in range(4)]
    for dtype in (torch.float64, torch.float32):
        rows = [[(big + small[0]).to(dtype)], [(-big + small[1]).to(dtype)], [small[2].to(dtype)], [small[3].to(dtype)]]
        wanted = oracle.combine([row[0].double().numpy() for row in rows])
        assert relative(reduced(rows, "gram")[0][0][0], wanted) < 1e-5


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("algorithm", ["rvh", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_that_is_not_finite_reaches_every_rank(bad: float, algorithm: Any, dtype: torch.dtype) -> None:
    rows = gradients(5, "normal", dtype)
    rows[3][3][0] = bad
    for tensors in reduced(rows, algorithm)[0]:
        assert not torch.isfinite(tensors[3]).all()
        assert torch.isfinite(tensors[5]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_half_precision_is_rounded_once_by_gram_and_once_per_level_by_rvh(world_size: int, dtype: torch.dtype) -> None:
    rows = gradients(world_size, "normal", dtype)
    wanted = adasum.combine(rows)
    gram, halved = reduced(rows, "gram")[0][0], reduced(rows, "rvh")[0][0]
    for found, other, right in zip(gram, halved, wanted, strict=True):
        if found.numel() > 2:
            assert torch.equal(found, right)
            step = torch.finfo(dtype).eps
            assert float((other - right).double().norm()) <= 4 * step * float(right.double().norm())


def test_tensors_of_any_stride_and_several_dtypes_in_one_call() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [
        [
            torch.randn(6, 4, generator=draw).t(),
            torch.randn(3, generator=draw, dtype=torch.float64),
            torch.randn(2, 3, 4, 5, generator=draw).to(memory_format=torch.channels_last),
            torch.randn((), generator=draw),
            torch.randn(9, generator=draw).bfloat16(),
        ]
        for _ in range(3)
    ]
    results, _, _ = reduced(rows, "gram")
    for found, right in zip(results[0], adasum.combine(rows), strict=True):
        assert found.stride() == right.stride() or found.dim() == 0
        torch.testing.assert_close(found, right, rtol=1e-6, atol=0)


def test_a_flat_buffer_is_reduced_where_it_lies() -> None:
    flats = [torch.randn(60) for _ in range(2)]
    rows = [list(torch.split(flat, [10, 20, 30])) for flat in flats]
    wanted = adasum.combine(rows)

    def work(transport: ThreadTransport) -> None:
        Reducer(transport, "gram").reduce(rows[transport.rank])

    in_threads(2, work)
    torch.testing.assert_close(flats[0], torch.cat(wanted))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 9000)), max_size=30),
    rows=st.integers(1, 5),
    cut=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_kernels_sum_over_the_layers_of_any_part(sizes: list[int], rows: int, cut: float, seed: int) -> None:
    segments = Segments(sizes)
    start = int(segments.total * cut)
    part = segments.part(start, segments.total)
    values = torch.randn(rows, segments.total, generator=torch.Generator().manual_seed(seed))
    wide = values.double()
    wide[:, :start] = 0
    layers = [each.numpy() for each in torch.split(wide, sizes, dim=1)] if sizes else []
    weights = np.random.default_rng(seed).normal(size=(rows, len(part.layers)))
    for kernel in (CpuKernel(rows), TorchKernel(rows, torch.device("cpu"))):
        kernel._limit = min(kernel._limit, 4096)
        mine = values[:, start:]
        dots = kernel.dots(mine, part)
        out = torch.empty(segments.total - start)
        kernel.weighted_sum(mine, part, weights, out)
        for index, layer in enumerate(part.layers):
            gram = layers[layer] @ layers[layer].T
            np.testing.assert_allclose(dots[:, index], gram[upper(rows)], rtol=1e-12, atol=1e-9)
            here = slice(int(part.bounds[index]), int(part.bounds[index + 1]))
            np.testing.assert_allclose(
                out[here].numpy(), weights[:, index] @ mine[:, here].double().numpy(), rtol=1e-5, atol=1e-5
            )


def test_nodes_are_averaged_before_they_are_combined() -> None:
    rows = gradients(5, "normal", torch.float64)
    leaves = ((3, 0), (1,), (4, 2))
    results, _, _ = reduced(rows, "auto", leaves=leaves)
    for layer, found in enumerate(results[0]):
        means = [torch.stack([rows[rank][layer] for rank in ranks]).mean(dim=0) for ranks in leaves]
        pair = adasum.pair(means[0], means[1], 2, 1)
        torch.testing.assert_close(found, adasum.pair(pair, means[2], 3, 2), rtol=1e-12, atol=1e-12)


def test_one_node_alone_is_averaged() -> None:
    rows = gradients(3, "normal", torch.float64)
    results, statistics, _ = reduced(rows, "gram", leaves=((0, 1, 2),))
    for layer, found in enumerate(results[0]):
        mean = torch.stack([row[layer] for row in rows]).mean(dim=0)
        torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-14)
        assert statistics[0].result_sqr_norms[layer] == pytest.approx(float(mean.square().sum()))


def test_ranks_are_taken_in_the_order_that_is_given() -> None:
    rows = gradients(5, "normal", torch.float64)
    order = (3, 1, 4, 0, 2)
    wanted = adasum.combine([rows[rank] for rank in order])
    for algorithm in ALGORITHMS:
        results, _, _ = reduced(rows, algorithm, leaves=tuple((rank,) for rank in order))
        for found, right in zip(results[0], wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)


def test_statistics_say_what_the_gradients_were() -> None:
    rows = gradients(3, "normal", torch.float64)
    wanted = expected(rows)
    for algorithm in ALGORITHMS:
        _, statistics, _ = reduced(rows, algorithm)
        found = statistics[0]
        squares = [sum(float(row[layer] @ row[layer]) for row in rows) for layer in range(len(SIZES))]
        np.testing.assert_allclose(found.sqr_norms, squares, rtol=1e-12)
        ratios = [float(value @ value) / square for value, square in zip(wanted, squares, strict=True) if square]
        np.testing.assert_allclose(found.orthogonality, ratios, rtol=1e-9)
        assert found.quantiles() == pytest.approx((min(ratios), float(np.median(ratios)), max(ratios)))
        mean = sum(float(torch.stack([row[layer] for row in rows]).mean(dim=0).square().sum()) for layer in range(6))
        assert found.mean_sqr_norm == (pytest.approx(mean) if algorithm == "gram" else None)


def test_the_tree_pairs_the_first_ranks_of_odd_worlds() -> None:
    assert levels(1) == ()
    assert levels(5) == (((0, 1), (2,), (3,), (4,)), ((0, 1), (2, 3)), ((0, 1),))
    assert levels(8) == (((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 1), (2, 3)), ((0, 1),))


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="a is sparse"):
        adasum.pair(torch.zeros(3).to_sparse(), torch.zeros(3))
    with pytest.raises(ValueError, match="int64; allowed: float32, float64, bfloat16, float16"):
        adasum.pair(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="allowed: the same shape"):
        adasum.pair(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="leaves_b is 0"):
        adasum.pair(torch.zeros(3), torch.zeros(3), 1, 0)
    with pytest.raises(ValueError, match="tensors_by_rank is empty"):
        adasum.combine([])
    with pytest.raises(ValueError, match="rank 1 has 2 tensors and rank 0 has 1"):
        adasum.combine([[torch.zeros(1)], [torch.zeros(1)] * 2])
    with pytest.raises(ValueError, match="algorithm is 'ring'; allowed: auto, rvh, gram"):
        adasum.all_reduce_([torch.zeros(1)], algorithm="ring")  # type: ignore[arg-type]  # the point


DISAGREEMENTS = {
    "number of tensors": lambda rank: [torch.zeros(2)] * (3 if rank == 1 else 2),
    "shapes": lambda rank: [torch.zeros(3 if rank == 1 else 2), torch.zeros(2)],
    "dtypes": lambda rank: [torch.zeros(2, dtype=torch.float64 if rank == 1 else torch.float32)],
}


@pytest.mark.parametrize("trait", DISAGREEMENTS)
def test_ranks_that_disagree_get_the_same_error(trait: str) -> None:
    def work(transport: ThreadTransport) -> str:
        tensors = DISAGREEMENTS[trait](transport.rank)
        with pytest.raises(ValueError, match="the ranks disagree") as error:
            Reducer(transport).reduce(tensors)
        return str(error.value)

    messages = set(in_threads(3, work))
    assert len(messages) == 1
    assert f"the ranks disagree on the {trait}" in messages.pop()


def test_a_sparse_tensor_on_one_rank_stops_all() -> None:
    def work(transport: ThreadTransport) -> str:
        tensor = torch.zeros(4)
        with pytest.raises(ValueError) as error:
            Reducer(transport).reduce([tensor.to_sparse() if transport.rank == 2 else tensor])
        return str(error.value)

    first, second, third = in_threads(3, work)
    assert first == second == "rank 2 cannot take part in this Adasum; its own error says why"
    assert "tensor 0 is sparse" in third
