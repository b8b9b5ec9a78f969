"""The sampler: every sample exactly once per epoch, whatever sizes and worlds come along."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stretto.sampler import ElasticSampler

FROZEN = [
    [0, 8, 9, 5, 6, 2, 7, 4, 3, 1],
    [1, 7, 3, 6, 4, 2, 8, 0, 9, 5],
    [7, 4, 3, 8, 6, 0, 2, 5, 1, 9],
]


@given(
    length=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=8),
)
def test_any_sequence_of_sizes_and_worlds_uses_each_sample_once_per_epoch(
    length: int, seed: int, shuffle: bool, sizes: list[tuple[int, int]]
) -> None:
    sampler = ElasticSampler(length, seed=seed, shuffle=shuffle)
    order = sampler.global_batch(0, 0, length)
    used: list[int] = []
    for size, world in itertools.cycle(sizes):
        batch = sampler.next_batch(size)
        shares = [sampler.for_rank(batch, rank, world) for rank in range(world)]
        assert list(itertools.chain.from_iterable(shares)) == batch
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)
        used += batch
        sampler.advance(len(batch))
        if sampler.epoch == 1:
            break
    assert used == order
    assert sorted(used) == list(range(length))
    assert sampler.consumed == 0


def test_the_order_is_frozen_for_all_releases() -> None:
    assert ElasticSampler(10, seed=0).global_batch(0, 0, 10) == FROZEN[0]
    assert ElasticSampler(10, seed=0).global_batch(1, 0, 10) == FROZEN[1]
    assert ElasticSampler(10, seed=2**40 + 3).global_batch(0, 0, 10) == FROZEN[2]


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated() -> None:
    length = 2000
    orders = [ElasticSampler(length, seed=s).global_batch(e, 0, length) for s in range(4) for e in range(4)]
    for first, second in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 12  # one is expected by chance
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_every_position_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        for position, index in enumerate(ElasticSampler(6, seed=seed).global_batch(0, 0, 6)):
            counts[position, index] += 1
    chi_squared = float(((counts - 500) ** 2 / 500).sum())
    assert chi_squared < 52.6  # 25 degrees of freedom, one in a thousand


def test_without_shuffling_the_order_is_the_datasets() -> None:
    sampler = ElasticSampler(7, seed=1, shuffle=False)
    assert sampler.global_batch(3, 2, 3) == [2, 3, 4]
    assert sampler.global_batch(3, 5, 30) == [5, 6]
    assert sampler.global_batch(3, 7, 1) == []


def test_a_short_batch_leaves_ranks_without_samples() -> None:
    sampler = ElasticSampler(10, seed=1)
    assert [sampler.for_rank([5, 6], rank, 4) for rank in range(4)] == [[5], [6], [], []]
    assert sampler.for_rank([], 0, 1) == []


def test_the_cursor_moves_only_by_advance_and_turns_over_at_the_end() -> None:
    sampler = ElasticSampler(10, seed=5)
    first = sampler.next_batch(4)
    assert sampler.next_batch(4) == first
    sampler.advance(4)
    assert (sampler.epoch, sampler.consumed) == (0, 4)
    assert len(sampler.next_batch(100)) == 6
    sampler.advance(6)
    assert (sampler.epoch, sampler.consumed) == (1, 0)
    assert sampler.next_batch(10) == sampler.global_batch(1, 0, 10) != sampler.global_batch(0, 0, 10)
    with pytest.raises(ValueError, match="10 samples left"):
        sampler.advance(11)


def test_a_saved_cursor_continues_in_the_saved_order() -> None:
    sampler = ElasticSampler(50, seed=5)
    sampler.advance(50)
    sampler.advance(20)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = ElasticSampler(50, seed=99, shuffle=False)
    resumed.next_batch(3)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.consumed, len(resumed)) == (1, 20, 50)
    assert resumed.next_batch(30) == sampler.next_batch(30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"length": 51}, "51 samples, this one has 50"),
        ({"consumed": 50}, "consumed=50 of 50"),
        ({"epoch": -1}, "epoch is -1"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    sampler = ElasticSampler(50, seed=5)
    sampler.advance(7)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ElasticSampler(0, seed=1), "length is 0"),
        (lambda: ElasticSampler(True, seed=1), "length is True"),
        (lambda: ElasticSampler(5, seed=-1), "seed is -1"),
        (lambda: ElasticSampler(5, seed=2**64), "seed is 18446744073709551616"),
        (lambda: ElasticSampler(5, seed=1).global_batch(-1, 0, 1), "epoch is -1"),
        (lambda: ElasticSampler(5, seed=1).global_batch(0, 6, 1), "consumed is 6"),
        (lambda: ElasticSampler(5, seed=1).global_batch(0, 0, 0), "size is 0"),
        (lambda: ElasticSampler(5, seed=1).for_rank([1], 2, 2), "rank is 2"),
        (lambda: ElasticSampler(5, seed=1).for_rank([1], 0, 0), "world_size is 0"),
        (
            lambda: ElasticSampler(5, seed=1).advance("1"),  # type: ignore[arg-type]  # wrong on purpose
            "n is '1'",
        ),
    ],
)
def test_bad_numbers_are_refused_with_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_epoch_is_permuted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    permuted: list[Any] = []
    original = np.random.RandomState

    def counting(words: Any) -> np.random.RandomState:
        permuted.append(words)
        return original(words)

    monkeypatch.setattr(np.random, "RandomState", counting)
    sampler = ElasticSampler(1000, seed=1)
    for epoch in (0, 1):
        for consumed in range(0, 1000, 10):
            sampler.global_batch(epoch, consumed, 10)
    assert len(permuted) == 2
