"""The gain estimator against a naive twin and against values that were worked out or measured by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from gain_oracle import GainOracle, statistics
from hypothesis import given
from hypothesis import strategies as st
from stretto import rules
from stretto.gain import GainEstimator

VARIANCE, SQR_NORM = 20.0, 1.0  # at the base batch size, as in the specification's examples


def expected_statistics(scale: float, k: int) -> dict[str, Any]:
    """What A and B are on average, for k contributions of any sizes, when VARIANCE and SQR_NORM are true."""
    noise = VARIANCE / scale
    return {
        "local_sqr_norm": SQR_NORM + k * noise,
        "global_sqr_norm": SQR_NORM + noise,
        "num_contributions": k,
        "scale": scale,
    }


def true_gain(scale: float) -> float:
    return (VARIANCE + SQR_NORM) / (VARIANCE / scale + SQR_NORM)


def sampled_estimator(sizes: list[int], *, base: int, steps: int, seed: int) -> GainEstimator:
    rng = np.random.RandomState(seed)
    dims = 64
    direction = np.full(dims, math.sqrt(SQR_NORM / dims))
    estimator = GainEstimator(smoothing=1 - 1 / steps)
    for _ in range(steps):
        spread = math.sqrt(VARIANCE * base / dims)
        gradients = [direction + rng.standard_normal(dims) * spread / math.sqrt(n) for n in sizes]
        a, b = statistics(sizes, gradients)
        estimator.update(local_sqr_norm=a, global_sqr_norm=b, num_contributions=len(sizes), scale=sum(sizes) / base)
    return estimator


@pytest.mark.parametrize(("sizes", "measured"), [([32, 8], 1.235), ([32, 32, 8, 1], 2.150), ([32, 32, 32, 32], 3.5)])
def test_unequal_contributions_give_the_true_gain(sizes: list[int], measured: float) -> None:
    estimator = sampled_estimator(sizes, base=32, steps=20_000, seed=7)
    scale = sum(sizes) / 32
    assert true_gain(scale) == pytest.approx(measured, abs=6e-4)
    assert estimator.gain(scale) == pytest.approx(measured, rel=0.01)
    assert estimator.variance == pytest.approx(VARIANCE, rel=0.03)


def test_a_changed_scale_has_the_right_gain_at_once() -> None:
    estimator = GainEstimator()
    for _ in range(300):
        estimator.update(**expected_statistics(4.0, 4))
    assert estimator.gain(4.0) == pytest.approx(3.5)
    assert estimator.gain(16.0) == pytest.approx(9.3333, abs=1e-3)
    estimator.update(**expected_statistics(16.0, 16))
    assert estimator.gain(16.0) == pytest.approx(9.3333, abs=1e-3)
    estimator.update(**expected_statistics(4.0, 4))
    assert estimator.gain(4.0) == pytest.approx(3.5)


def test_a_changed_scale_stays_within_the_noise_on_sampled_gradients() -> None:
    estimator = sampled_estimator([8] * 4, base=8, steps=4000, seed=3)
    assert estimator.gain(16.0) == pytest.approx(9.3333, rel=0.06)


contribution_lists = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(
    steps=st.lists(contribution_lists, min_size=1, max_size=12),
    base=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    theta=st.sampled_from([None, 0.0, 0.5, 0.99]),
)
def test_agrees_with_the_oracle_for_any_sizes_and_scales(
    steps: list[list[int]], base: int, seed: int, theta: float | None
) -> None:
    rng = np.random.RandomState(seed)
    estimator = GainEstimator(smoothing="paper" if theta is None else theta)
    oracle = GainOracle(theta)
    for sizes in steps:
        gradients = [rng.standard_normal(5) + 0.5 if n else np.zeros(5) for n in sizes]
        scale = sum(sizes) / base
        a, b = statistics(sizes, gradients)
        k = sum(n > 0 for n in sizes)
        estimator.update(local_sqr_norm=a, global_sqr_norm=b, num_contributions=k, scale=scale)
        oracle.update(sizes, gradients, scale)
        assert estimator.gain(scale) == pytest.approx(oracle.gain(scale), rel=1e-6)
        assert min(1.0, scale) <= estimator.gain(scale) <= max(1.0, scale)
        variance, sqr_norm = oracle.averages()
        assert estimator.variance == pytest.approx(variance, rel=1e-6, abs=1e-9)
        assert estimator.sqr_norm == pytest.approx(sqr_norm, rel=1e-6, abs=1e-9)


def test_one_contribution_updates_nothing_and_uses_what_is_stored() -> None:
    estimator = GainEstimator()
    estimator.update(local_sqr_norm=5.0, global_sqr_norm=5.0, num_contributions=1, scale=3.0)
    assert (estimator.gain(3.0), estimator.gain(1.0), estimator.num_updates) == (1.0, 1.0, 0)
    estimator.update(**expected_statistics(2.0, 2))
    before = estimator.state_dict()
    estimator.update(local_sqr_norm=9.0, global_sqr_norm=9.0, num_contributions=1, scale=1.0)
    assert estimator.state_dict() == before
    assert estimator.gain(1.0) == 1.0
    assert estimator.gain(2.0) == pytest.approx(true_gain(2.0))


@pytest.mark.parametrize("scale", [0.125, 0.5, 1.5, 2.28125, 700.3])
def test_scales_need_not_be_whole_or_above_one(scale: float) -> None:
    estimator = GainEstimator()
    estimator.update(**expected_statistics(scale, 3))
    assert estimator.gain(scale) == pytest.approx(true_gain(scale))
    assert (estimator.gain(scale) < 1) == (scale < 1)


@pytest.mark.parametrize(("a", "b"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (math.inf, math.inf)])
def test_non_finite_statistics_change_nothing(a: float, b: float) -> None:
    estimator = GainEstimator()
    estimator.update(**expected_statistics(4.0, 4))
    before = estimator.state_dict()
    estimator.update(local_sqr_norm=a, global_sqr_norm=b, num_contributions=4, scale=4.0)
    assert estimator.state_dict() == before
    assert estimator.num_updates == 1


def test_statistics_whose_variance_overflows_change_nothing() -> None:
    estimator = GainEstimator()
    estimator.update(local_sqr_norm=1e308, global_sqr_norm=1e300, num_contributions=2, scale=1e3)
    assert estimator.num_updates == 0


def test_zero_gradients_give_a_gain_of_one() -> None:
    estimator = GainEstimator()
    estimator.update(local_sqr_norm=0.0, global_sqr_norm=0.0, num_contributions=4, scale=4.0)
    assert estimator.gain(4.0) == 1.0


@pytest.mark.parametrize("unit", [1e-300, 1e-30, 1e-12, 1e12, 1e290])
def test_the_gain_does_not_depend_on_the_gradients_unit(unit: float) -> None:
    estimator = GainEstimator()
    numbers = expected_statistics(8.0, 8)
    numbers["local_sqr_norm"] *= unit
    numbers["global_sqr_norm"] *= unit
    estimator.update(**numbers)
    assert estimator.gain(8.0) == pytest.approx(true_gain(8.0))


def test_averages_stay_signed_and_are_clipped_when_read() -> None:
    estimator = GainEstimator(smoothing=0.9)
    estimator.update(local_sqr_norm=1.0, global_sqr_norm=3.0, num_contributions=2, scale=2.0)
    assert (estimator.variance, estimator.gain(2.0)) == (0.0, 1.0)
    assert estimator.state_dict()["variance"] == -4.0
    estimator.update(local_sqr_norm=9.0, global_sqr_norm=4.0, num_contributions=2, scale=2.0)
    assert estimator.variance == pytest.approx((-4.0 + 10.0) / 2)


def test_clipping_before_averaging_reproduces_the_authors_estimator() -> None:
    estimator = GainEstimator(smoothing=0.9, clip="before-averaging")
    estimator.update(local_sqr_norm=1.0, global_sqr_norm=3.0, num_contributions=2, scale=2.0)
    assert estimator.variance == 1e-6
    assert estimator.sqr_norm == pytest.approx(5.0)
    estimator.update(local_sqr_norm=9.0, global_sqr_norm=4.0, num_contributions=2, scale=2.0)
    assert estimator.variance == pytest.approx((1e-6 + 10.0) / 2)
    assert estimator.sqr_norm == pytest.approx((5.0 + 0.0) / 2)  # 4 - 10/2 is below 0


@pytest.mark.parametrize("k", [1000, 4096])
def test_a_thousand_contributions_are_not_averaged(k: int) -> None:
    estimator = GainEstimator()
    estimator.update(local_sqr_norm=7.0, global_sqr_norm=5.0, num_contributions=k, scale=float(k))
    estimator.update(**expected_statistics(float(k), k))
    assert estimator.gain(float(k)) == pytest.approx(true_gain(float(k)))


def test_few_contributions_at_a_large_scale_average_as_long_as_few_do() -> None:
    estimator = GainEstimator()
    for _ in range(1000):
        estimator.update(**expected_statistics(256.0, 2))
    assert estimator.state_dict()["weight"] == pytest.approx(500.0)


def test_state_survives_json_and_continues_alike() -> None:
    first, second = GainEstimator(), GainEstimator()
    for scale in (2.0, 8.0, 0.5):
        first.update(**expected_statistics(scale, 2))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for estimator in (first, second):
        estimator.update(local_sqr_norm=50.0, global_sqr_norm=3.0, num_contributions=5, scale=5.0)
    assert second.state_dict() == first.state_dict()
    assert second.gain(3.0) == first.gain(3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": None}, "format version None"),
        ({"variance": math.nan}, "finite"),
        ({"weight": -1.0}, "weight 0 or more"),
    ],
)
def test_an_unreadable_state_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    estimator = GainEstimator()
    estimator.update(**expected_statistics(4.0, 4))
    before = estimator.state_dict()
    with pytest.raises(ValueError, match=message):
        estimator.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="lacks weight"):
        estimator.load_state_dict({key: value for key, value in before.items() if key != "weight"})
    assert estimator.state_dict() == before


@pytest.mark.parametrize("options", [{"smoothing": "none"}, {"smoothing": 1.0}, {"smoothing": -0.1}, {"clip": "never"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        GainEstimator(**options)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": math.nan},
        {"num_contributions": -1},
        {"num_contributions": 1.5},
        {"local_sqr_norm": -1.0},
        {"global_sqr_norm": -0.5},
    ],
)
def test_impossible_statistics_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        GainEstimator().update(**{**expected_statistics(2.0, 2), **change})


def test_importing_the_estimator_does_not_import_torch() -> None:
    code = "import sys, stretto, stretto.gain, stretto.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def state_at(tau: float = 0.0, target_tau: float | None = None) -> rules.RuleState:
    estimator = GainEstimator()
    estimator.update(**expected_statistics(4.0, 4))
    return rules.RuleState(estimator, tau, target_tau)


@pytest.mark.parametrize(
    ("name", "factor", "increment"),
    [("identity", 1.0, 1.0), ("linear", 4.0, 4.0), ("sqrt", 2.0, 4.0), ("adascale", 3.5, 3.5)],
)
def test_rules_by_name(name: str, factor: float, increment: float) -> None:
    assert rules.named(name)(state_at(), 4.0) == pytest.approx((factor, increment))


def test_linear_warmup_rises_to_the_scale_over_five_and_a_half_percent() -> None:
    factors = [rules.linear_warmup(state_at(tau, 1000.0), 4.0).lr_factor for tau in (0.0, 27.5, 55.0, 500.0)]
    assert factors == pytest.approx([1.0, 2.5, 4.0, 4.0])
    with pytest.raises(ValueError, match="target_tau"):
        rules.linear_warmup(state_at(), 4.0)


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="adamscale, adascale, adasum, adasum-delta, identity, linear"):
        rules.named("adagrad")
