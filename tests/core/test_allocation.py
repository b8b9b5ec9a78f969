"""Nodes shared by several jobs: exact where that can be checked, near it elsewhere, fast, and calm."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from stretto_controller.core.goodput.allocation import Bid, allocate, few_changes, total_value


def concave(rng: random.Random, count: int) -> tuple[float, ...]:
    noise, exchange = rng.uniform(0.2, 50.0), rng.uniform(0.0, 0.5)
    sizes = range(1, count + 1)
    return tuple((noise + 1) / (noise / n + 1) / (1 + exchange * (n > 1) + 0.01 * (n - 1)) for n in sizes)


def jagged(rng: random.Random, count: int) -> tuple[float, ...]:
    """Rises in jumps, as where the work is split into micro-batches."""
    rate, rates = rng.uniform(0.5, 2.0), []
    for _ in range(count):
        rates.append(rate)
        rate *= rng.choice([1.0, 1.0, rng.uniform(0.95, 1.3), rng.uniform(1.0, 1.9)])
    return tuple(rates)


def bids(rng: random.Random, jobs: int, most: int) -> list[Bid]:
    return [
        Bid(
            f"job-{i}",
            rng.randint(1, 3),
            rng.choice([concave, jagged])(rng, rng.randint(1, most)),
            weight=rng.choice([1.0, 1.0, 2.0, 0.5]),
        )
        for i in range(jobs)
    ]


def by_brute_force(offered: list[Bid], capacity: int) -> float:
    ranges = [range(bid.least, bid.most + 1) for bid in offered]
    return max(
        sum(bid.value(n) for bid, n in zip(offered, sizes, strict=True))
        for sizes in itertools.product(*ranges)
        if sum(sizes) <= capacity
    )


def optimum(offered: list[Bid], capacity: int) -> float:
    """By dynamic programming, with numpy: what no greedy choice can beat."""
    free = capacity - sum(bid.least for bid in offered)
    best = np.zeros(free + 1)
    for bid in offered:
        grown = best.copy()
        for extra, value in enumerate(bid.values[: free + 1]):
            grown[extra:] = np.maximum(grown[extra:], best[: free + 1 - extra] + value)
        best = grown
    return float(best[-1])


@pytest.mark.parametrize("seed", range(60))
def test_small_cases_are_exact(seed: int) -> None:
    rng = random.Random(seed)
    offered = bids(rng, rng.randint(1, 4), 6)
    least = sum(bid.least for bid in offered)
    capacity = least + rng.randint(0, 12)
    allocation = allocate(offered, capacity)
    assert sum(allocation.values()) <= capacity
    assert total_value(offered, allocation) == pytest.approx(by_brute_force(offered, capacity), abs=1e-9)


def test_two_hundred_larger_cases_are_within_one_percent() -> None:
    shares = []
    for seed in range(200):
        rng = random.Random(seed)
        offered = bids(rng, rng.randint(20, 60), 32)
        capacity = sum(bid.least for bid in offered) + rng.randint(50, 400)
        allocation = allocate(offered, capacity)
        assert sum(allocation.values()) <= capacity
        assert all(bid.least <= allocation[bid.job] <= bid.most for bid in offered)
        shares.append(total_value(offered, allocation) / optimum(offered, capacity))
    print(f"worst {1 - min(shares):.2%} below the optimum, {sum(s < 1 - 1e-9 for s in shares)} of 200 below it at all")
    assert min(shares) > 0.99


def test_a_higher_priority_gets_its_minimum_first_and_weight_decides_the_rest() -> None:
    rates = tuple(float(n) for n in range(1, 9))
    offered = [Bid("low", 2, rates), Bid("high", 2, rates, priority=1), Bid("none", 3, rates, priority=-1)]
    assert allocate(offered, 4) == {"low": 2, "high": 2, "none": 0}
    heavy = [Bid("light", 1, rates), Bid("heavy", 1, rates, weight=3.0)]
    assert allocate(heavy, 8) == {"light": 2, "heavy": 6}


def test_who_has_nodes_is_not_thrown_out_by_who_comes_later() -> None:
    offered = [Bid("new", 3, (1.0, 1.5)), Bid("old", 3, (1.0, 1.5), nodes=3)]
    assert allocate(offered, 4) == {"new": 0, "old": 4}


def test_changes_are_few_and_worth_it() -> None:
    rng = random.Random(3)
    offered = [Bid(f"job-{i}", 1, concave(rng, 16), nodes=rng.choice([1, 2, 8])) for i in range(12)]
    capacity = sum(bid.nodes for bid in offered)
    target = allocate(offered, capacity)
    now = {bid.job: bid.nodes for bid in offered}
    nodes = few_changes(offered, target, capacity, changes=4, worth=0.01)
    assert 0 < sum(nodes[job] != now[job] for job in now) <= 4
    assert sum(nodes.values()) <= capacity
    assert total_value(offered, nodes) > total_value(offered, now)
    assert few_changes(offered, target, capacity, changes=4, worth=math.inf) == now


def test_nodes_that_are_gone_are_given_up_whatever_it_takes() -> None:
    offered = [Bid(f"job-{i}", 1, tuple(float(n) for n in range(1, 9)), nodes=4) for i in range(6)]
    target = allocate(offered, 12)
    nodes = few_changes(offered, target, 12, changes=1, worth=math.inf)
    assert sum(nodes.values()) <= 12


def test_steps_lead_to_the_target() -> None:
    rng = random.Random(5)
    curves = {f"job-{i}": concave(rng, 16) for i in range(10)}
    now = dict.fromkeys(curves, 4)
    for _ in range(20):
        offered = [Bid(job, 1, rates, nodes=now[job]) for job, rates in curves.items()]
        target = allocate(offered, 40)
        now = few_changes(offered, target, 40, changes=4, worth=0.0)
    assert total_value(offered, now) == pytest.approx(total_value(offered, target), rel=0.02)
