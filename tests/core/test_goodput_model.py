"""The model of step times and gains: what it recovers from noisy systems, and what it says of what it does not know."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import pytest
from scipy.optimize import nnls
from stretto.gain import GainEstimator
from stretto_controller.core.goodput.least_squares import non_negative
from stretto_controller.core.goodput.measured import Measured
from stretto_controller.core.goodput.situation import Batches, Moments, Situation
from stretto_controller.core.goodput.step_time import Point, Shape, StepTime, fitted

NOISE = 0.1
# A size is reported on each second; so it was seen for ten.
REPORTS = 10
UNSEEN = [Shape(w, b, a) for w in (5, 10, 12, 16) for b in (16.0, 64.0) for a in (1, 4)]


@dataclass(frozen=True)
class System:
    overhead_s: float
    sample_s: float
    exchange_s: float
    hop_s: float

    def seconds(self, shape: Shape) -> float:
        compute = shape.accumulation * (self.overhead_s + self.sample_s * shape.local_batch)
        return compute + (shape.workers > 1) * self.exchange_s + max(shape.workers - 2, 0) * self.hop_s


def system(rng: random.Random) -> System:
    return System(rng.uniform(0.01, 0.1), rng.uniform(5e-4, 5e-3), rng.uniform(0.01, 0.1), rng.uniform(1e-3, 1e-2))


def observed(true: System, rng: random.Random) -> StepTime:
    measured = Measured()
    for workers in (1, 2, 3, 4, 6, 8):
        for local_batch in (8.0, 32.0, 128.0):
            for accumulation in (1, 2):
                shape = Shape(workers, local_batch, accumulation)
                for _ in range(REPORTS):
                    step_s = true.seconds(shape) * max(0.1, rng.gauss(1.0, NOISE))
                    measured = measured.with_steps(shape, workers, step_s, 10)
    model = fitted(measured.points)
    assert model is not None
    return model


def test_a_hundred_noisy_systems_are_recovered() -> None:
    errors: dict[str, list[float]] = {name: [] for name in System.__dataclass_fields__}
    worst = []
    within = []
    for seed in range(100):
        rng = random.Random(seed)
        true = system(rng)
        model = observed(true, rng)
        for name, found in errors.items():
            found.append(abs(getattr(model, name) / getattr(true, name) - 1))
        off = [model.seconds(shape) / true.seconds(shape) - 1 for shape in UNSEEN]
        worst.append(max(map(abs, off)))
        within += [abs(model.seconds(shape) - true.seconds(shape)) <= 2 * model.error_s(shape) for shape in UNSEEN]
    for name, found in errors.items():
        print(f"{name}: median error {statistics.median(found):.1%}, 95th percentile {sorted(found)[94]:.1%}")
    print(f"sizes not seen: worst error {max(worst):.1%}; {statistics.fmean(within):.0%} within two standard errors")
    # A coefficient that is a small part of every step cannot be known as well as the steps are.
    allowed = {"overhead_s": 0.1, "sample_s": 0.1, "exchange_s": 0.15, "hop_s": 0.2}
    for name, found in errors.items():
        assert statistics.median(found) < allowed[name], name
    assert max(worst) < 0.15
    assert statistics.fmean(within) > 0.85


@pytest.mark.parametrize("seed", range(30))
def test_the_fit_is_scipy_s(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 1) for _ in range(5)] for _ in range(rng.randint(5, 30))]
    values = [rng.gauss(0, 1) for _ in rows]
    expected, _ = nnls(rows, values)
    assert non_negative(rows, values).coefficients == pytest.approx(expected, abs=1e-8)


def test_columns_that_cannot_be_told_apart_share_nothing() -> None:
    fit = non_negative([[1.0, 32.0], [1.0, 32.0]], [2.0, 2.2])
    assert fit.coefficients == pytest.approx((2.1, 0.0))
    assert fit.support == (0,)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 1.5, 4.0, 64.0])
def test_the_gain_is_the_worker_library_s(scale: float) -> None:
    estimator = GainEstimator(smoothing=0.0)
    estimator.update(local_sqr_norm=5.0, global_sqr_norm=2.0, num_contributions=4, scale=4.0)
    moments = Moments(estimator.variance, estimator.sqr_norm)
    assert moments.gain(scale) == pytest.approx(estimator.gain(scale), rel=1e-12)


def situation(model: StepTime, **changes: float) -> Situation:
    values: dict[str, object] = {
        "min_nodes": 1, "max_nodes": 16, "nodes": 2, "slots": 1.0,
        "batches": Batches(32, 32), "moments": Moments(8.0, 1.0), "model": model,
    }  # fmt: skip
    return Situation(**{**values, **changes})  # type: ignore[arg-type]  # a test's shorthand


def test_one_size_seen_says_nothing_of_what_more_workers_cost() -> None:
    model = fitted([Point(Shape(1, 32.0), 1, 0.1, 50)])
    assert model is not None
    assert model.seconds(Shape(4, 32.0)) == pytest.approx(0.1)
    assert model.error_s(Shape(4, 32.0)) == 0.0


def test_nothing_seen_is_no_model() -> None:
    assert fitted([]) is None


def test_what_lies_beyond_twice_the_largest_size_is_said_to_be_a_guess() -> None:
    model = fitted([Point(Shape(w, 32.0), w, 0.1 + 0.01 * w, 50) for w in (1, 2)])
    assert model is not None
    sizes = {size.nodes: size for size in situation(model).predictions()}
    assert [n for n in sizes if sizes[n].seen] == [1, 2]
    assert [n for n in sizes if sizes[n].extrapolated] == [n for n in sizes if n > 4]
    assert max(sizes) == 16


def test_rates_are_the_gain_over_the_step_time_and_remaining_time_follows() -> None:
    model = fitted([Point(Shape(w, 32.0), w, 0.1 * w**0.5, 50) for w in (1, 2)])
    assert model is not None
    known = situation(model, remaining_tau=100.0)
    two = next(size for size in known.predictions() if size.nodes == 2)
    gain = (8 + 1) / (8 / 2 + 1)
    assert two.gain == pytest.approx(gain)
    assert two.progress_rate == pytest.approx(gain / (0.1 * 2**0.5), rel=1e-6)
    assert known.remaining_s(2) == pytest.approx(100 / two.progress_rate)


def test_a_fixed_global_batch_is_split_and_accumulated() -> None:
    batches = Batches(base=16, local=32, total=128)
    assert batches.scale(1) == batches.scale(4) == 8.0
    assert batches.shape(1) == Shape(1, 32.0, 4)
    assert batches.shape(3) == Shape(3, 128 / 3 / 2, 2)
    assert batches.shape(8) == Shape(8, 16.0, 1)


def test_old_measurements_fade() -> None:
    measured = Measured()
    for step_s in [0.1] * 100 + [0.2] * 100:
        measured = measured.with_steps(Shape(2, 32.0), 2, step_s, 50)
    assert measured.points[0].step_s == pytest.approx(0.2, rel=0.02)
