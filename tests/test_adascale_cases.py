"""The cases that must come out right, by number; docs/adascale.md lists them in words.

Each is the shortest plain loop that shows it. Where ranks matter they are gloo processes, and the loops are in
ddp_variants.py and below; test_adascale.py, test_adascale_ddp.py and test_gain.py go into the corners.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from ddp_loop import ALONE, Loop
from ddp_variants import a_grad_scaler_with_an_infinity_on_one_rank, two_ranks_then_one_then_two
from gain_oracle import GainOracle, statistics
from rank_scenarios import Scenario, expect, in_ranks, run
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from stretto.gain import GainEstimator
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from toy_regression import (
    LR,
    backward,
    expect_step,
    loss_of,
    make,
    make_batch,
    make_model,
    parameters_of,
    take_step,
)

VARIANCE, SQR_NORM = 20.0, 1.0
POISONED = Scenario((((4,), (4,)),) * 4, poisoned=2)


def draw(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return [make_batch(4, 100 * seed + j) for j in range(count)]


class Noise(nn.Module):
    """A parameter whose mini-batch gradient is what is drawn: mean square mu^2, variance sigma^2 per base batch."""

    def __init__(self, seed: int, dims: int = 256) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dims, dtype=torch.float64))
        self._rng = np.random.RandomState(seed)
        self._mean = math.sqrt(SQR_NORM / dims)
        self._spread = math.sqrt(VARIANCE / dims)

    def forward(self) -> Tensor:
        gradient = self._mean + self._spread * self._rng.standard_normal(self.weight.numel())
        return self.weight @ torch.from_numpy(gradient)


def true_gain(scale: float) -> float:
    return (VARIANCE + SQR_NORM) / (VARIANCE / scale + SQR_NORM)


def work_of_two_ranks(rank: int) -> dict[str, Any]:
    ALONE.extend(torch.distributed.new_group([other]) for other in range(2))
    two_ranks_then_one_then_two()
    a_grad_scaler_with_an_infinity_on_one_rank()
    loop = Loop()
    loop.take(6)
    return {
        "poisoned": vars(run(POISONED, rank)),
        "gains": (loop.ada.gain, loop.ada.tau, loop.ada.variance),
        "parameters": parameters_of(loop.bare),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    spawn(in_ranks, (2, str(folder), work_of_two_ranks), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def test_case_01_the_scale_changes_and_the_next_gain_is_right() -> None:
    """S 4 -> 16 -> 4 with known sigma^2 and mu^2: right at the very next step, tau and schedule go on."""
    seed = 11
    print(f"seed {seed}")
    model = Noise(seed)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 10**9)
    ada = AdaScale(inner, model, base_batch_size=8, accumulation_steps=4, scheduler=scheduler)

    def train(count: int, steps: int) -> None:
        ada.rebind(model, accumulation_steps=count)
        for _ in range(steps):
            before = ada.tau
            ada.zero_grad()
            for _ in range(count):
                backward(model() / count)
            ada.step()
            assert ada.tau == before + ada.gain
            assert scheduler.last_epoch == math.floor(ada.tau)

    train(4, 1000)
    settled = ada.gain
    # With the 250 samples that are remembered at S = 4, one standard error of r is about 1 % here.
    assert settled == pytest.approx(true_gain(4), rel=0.04)
    train(16, 1)
    assert ada.gain == pytest.approx(true_gain(16), rel=0.08)
    train(16, 60)
    train(4, 1)
    assert ada.gain == pytest.approx(true_gain(4), rel=0.04)


def test_case_02_unequal_contributions_are_weighted() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=3)
    for step, sizes in enumerate([(16, 2, 1), (1, 40, 3)]):
        batches = [make_batch(n, 10 * step + j) for j, n in enumerate(sizes)]
        gain, parameters = expect_step(model, batches, oracle, base=4)
        ada.zero_grad()
        for n, batch in zip(sizes, batches, strict=True):
            ada.set_num_samples(n, total=sum(sizes))
            backward(loss_of(model, batch) / 3)
        ada.step()
        assert ada.gain == pytest.approx(gain, rel=1e-9)
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_case_03_the_scale_need_not_be_an_integer() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, base_batch_size=5, batch_size=4, accumulation_steps=2)
    gain, _ = expect_step(model, draw(0, 2), oracle, base=5)
    take_step(ada, model, draw(0, 2))
    assert (ada.scale, ada.gain) == pytest.approx((1.6, gain), rel=1e-9)


def test_case_04_below_the_base_batch_size_the_gain_is_below_one() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, base_batch_size=32, batch_size=4, accumulation_steps=2)
    gain, _ = expect_step(model, draw(0, 2), oracle, base=32)
    take_step(ada, model, draw(0, 2))
    assert 0.25 <= ada.gain < 1.0
    assert (ada.gain, ada.tau) == pytest.approx((gain, gain), rel=1e-9)


def test_case_05_a_single_contribution_uses_what_is_stored(two_ranks: list[dict[str, Any]]) -> None:
    assert len(two_ranks) == 2  # two ranks, then one, then two: asserted there
    model = make_model()
    ada = make(model, batch_size=16)
    take_step(ada, model, [make_batch(16, 0)])
    assert (ada.scale, ada.gain) == (4.0, 1.0)  # S != 1 and no averages yet: r = 1


def test_case_06_clipping_on_read_or_before_averaging() -> None:
    """The samples' variance is clipped where it is read, or, as the paper's authors did, before it is averaged."""
    for clip, floor in (("on-read", 0.0), ("before-averaging", 1e-6)):
        model = make_model()
        ada = make(model, accumulation_steps=2, settings=AdaScaleSettings(clip=clip))  # type: ignore[arg-type]  # one of two
        take_step(ada, model, [make_batch(4, 1)] * 2)  # the same batch twice: no variance
        assert ada.variance == pytest.approx(floor, abs=1e-12)
        assert ada.gain == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("unit", [0.0, 1e-18, 1.0])
def test_case_07_zero_and_tiny_gradients(unit: float) -> None:
    model, oracle = make_model(dtype=torch.float32), GainOracle()
    batches = [make_batch(4, j, torch.float32) for j in range(2)]
    gain, _ = expect_step(model, batches, oracle, base=4)
    ada = make(model, accumulation_steps=2)
    for batch in batches:
        backward(loss_of(model, batch) * (unit / 2))
    ada.step()
    assert ada.gain == pytest.approx(gain if unit else 1.0, rel=1e-4)


def test_case_08_a_non_finite_step_touches_nothing_on_any_rank(two_ranks: list[dict[str, Any]]) -> None:
    expected = expect(POISONED)
    for results in two_ranks:
        assert results["poisoned"]["skipped"] == 1
        assert results["poisoned"]["gains"] == pytest.approx(expected.gains, rel=1e-9)
        assert results["poisoned"]["taus"] == pytest.approx(expected.taus, rel=1e-9)


def test_case_09_the_grad_scalers_scale_does_not_matter(two_ranks: list[dict[str, Any]]) -> None:
    assert len(two_ranks) == 2  # an infinity on one of two ranks: asserted there
    model, plain = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1)  # doubles after each step
    ada, reference = make(model, accumulation_steps=2, grad_scaler=scaler), make(plain, accumulation_steps=2)
    for step in range(4):
        batches = [make_batch(4, 10 * step + j, torch.float32) for j in range(2)]
        ada.zero_grad()
        for batch in batches:
            backward(scaler.scale(loss_of(model, batch) / 2))
        scaler.step(ada)
        scaler.update()
        take_step(reference, plain, batches)
        assert (ada.variance, ada.gain) == pytest.approx((reference.variance, reference.gain), rel=1e-4)


def test_case_10_clipping_does_not_reach_the_statistics() -> None:
    seen = []
    for limit in (math.inf, 1e-3):
        model = make_model()
        ada = make(model, accumulation_steps=2)
        for batch in draw(0, 2):
            backward(loss_of(model, batch) / 2)
        nn.utils.clip_grad_norm_(model.parameters(), limit)  # between backward and step
        ada.step()
        seen.append((ada.gain, ada.variance, ada.sqr_norm))
    assert seen[0] == seen[1]


def test_case_11_frozen_and_unused_parameters() -> None:
    """On one rank or all of them: test_adascale_ddp.py, test_adascale_distributed.py."""
    model, oracle = make_model(), GainOracle()
    model.register_parameter("unused", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    ada = make(model, accumulation_steps=2)
    for step in range(4):
        model[0].weight.requires_grad_(step < 2)  # frozen later
        gain, _ = expect_step(model, draw(step, 2), oracle, base=4)
        take_step(ada, model, draw(step, 2))
        assert ada.gain == pytest.approx(gain, rel=1e-9)


def test_case_12_a_tensor_learning_rate_is_restored_exactly_also_when_the_step_raises() -> None:
    """A capturable Adam refuses a CPU in its step: the rate is the same tensor with the same bits all the same."""
    model = make_model()
    rate = torch.tensor(0.1)
    inner = torch.optim.Adam(model.parameters(), lr=rate, capturable=True, foreach=False)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2)
    with pytest.raises((AssertionError, RuntimeError)):
        take_step(ada, model, draw(0, 2))
    assert inner.param_groups[0]["lr"] is rate
    assert torch.equal(rate, torch.tensor(0.1))
    assert (ada.tau, ada.variance) == (0.0, 0.0)


def test_case_13_one_gain_for_all_groups_and_for_tau() -> None:
    model = make_model()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.02}]
    ada = AdaScale(torch.optim.SGD(groups), model, base_batch_size=4, accumulation_steps=4)
    take_step(ada, model, draw(0, 4))
    assert ada.tau == ada.gain
    assert ada.effective_lr == pytest.approx([0.1 * ada.gain, 0.02 * ada.gain])


def test_case_14_a_step_across_several_integers_steps_the_scheduler_as_often() -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=5, scheduler=scheduler, rule="linear")
    take_step(ada, model, draw(0, 5))
    assert (ada.tau, scheduler.last_epoch, inner.param_groups[0]["lr"]) == (5.0, 5, 0.5**5)


def test_case_15_the_state_is_plain_and_goes_on_at_another_scale() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2)
    for step in range(3):
        take_step(ada, model, draw(step, 2))
    file = io.BytesIO()
    torch.save(ada.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(saved["adascale"])) == ada.state_dict()["adascale"]
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    resumed = make(twin, accumulation_steps=5)
    resumed.load_state_dict(saved)
    ada.rebind(model, accumulation_steps=5)
    for each, its in ((ada, model), (resumed, twin)):
        take_step(each, its, draw(9, 5))
    assert (resumed.gain, resumed.tau) == (ada.gain, ada.tau)


def test_case_16_accumulation() -> None:
    """Means or sums of losses, a short last window, a count that changes; no_sync: test_adascale_ddp.py."""
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=3, settings=AdaScaleSettings(accumulated_loss="sum"))
    gain, _ = expect_step(model, draw(0, 3), oracle, base=4)
    take_step(ada, model, draw(0, 3), divide_by=1)
    assert ada.gain == pytest.approx(gain, rel=1e-9)
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=4)
    for step, (count, window) in enumerate([(4, 4), (2, 4), (6, 6), (1, 1)]):
        ada.rebind(model, accumulation_steps=window)
        gain, _ = expect_step(model, draw(step, count), oracle, base=4)
        take_step(ada, model, draw(step, count), divide_by=window)
        assert (ada.scale, ada.gain) == pytest.approx((count, gain), rel=1e-9)


def test_case_17_the_gain_comes_after_the_closures_backward() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=2)
    gain, parameters = expect_step(model, draw(0, 2), oracle, base=4)

    def closure() -> Tensor:
        ada.zero_grad()
        losses = [loss_of(model, batch) / 2 for batch in draw(0, 2)]
        for loss in losses:
            backward(loss)
        return torch.stack(losses).sum()

    assert ada.step(closure).item() > 0
    assert ada.gain == pytest.approx(gain, rel=1e-9)
    np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)
    with pytest.raises(ValueError, match="evaluates its closure several times"):
        AdaScale(torch.optim.LBFGS(model.parameters()), model, base_batch_size=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_case_18_half_precision_gradients_have_wide_norms(dtype: torch.dtype) -> None:
    """Gradients of 300 in float16: their squares, 90,000, are beyond its range."""
    model = nn.Linear(5000, 1, bias=False, dtype=dtype)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=1e-6), model, base_batch_size=1, accumulation_steps=2)
    generator = torch.Generator().manual_seed(5)
    rows = [(300 + 100 * torch.randn(1, 5000, generator=generator)).to(dtype) for _ in range(2)]
    for x in rows:
        backward((model(x) / 2).sum())
    ada.step()
    gradients = [(x[0] / 2).double().numpy() * 2 for x in rows]
    a, b = statistics([1, 1], gradients)
    expected = GainEstimator()
    expected.update(local_sqr_norm=a, global_sqr_norm=b, num_contributions=2, scale=2.0)
    assert ada.variance == pytest.approx(expected.variance, rel=2e-3 if dtype == torch.float16 else 3e-2)
    assert ada.gain == pytest.approx(expected.gain(2.0), rel=3e-3)


def test_case_19_every_rank_applies_the_bit_identical_gain(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["gains"] == two_ranks[1]["gains"]
    np.testing.assert_array_equal(two_ranks[0]["parameters"], two_ranks[1]["parameters"])


def test_case_20_a_thousand_contributions_are_not_averaged() -> None:
    model = Noise(3, dims=4)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=0.0), model, base_batch_size=1, accumulation_steps=1000)
    for _ in range(2):
        ada.zero_grad()
        for _ in range(1000):
            backward(model() / 1000)
        ada.step()
        assert ada.state_dict()["adascale"]["estimator"]["weight"] == 1.0


def test_case_21_a_step_that_breaks_is_dropped_whole() -> None:
    """With a rank that dies: test_a_rank_that_dies_in_a_step_drops_the_step_whole. Here the binding is given up."""
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=2)
    expect_step(model, draw(0, 2), oracle, base=4)
    take_step(ada, model, draw(0, 2))
    ada.zero_grad()
    backward(loss_of(model, make_batch(4, 77)) / 2)  # half a step
    ada.unbind()
    ada.rebind(model)
    gain, parameters = expect_step(model, draw(1, 2), oracle, base=4)
    for batch in draw(1, 2):
        backward(loss_of(model, batch) / 2)
    ada.step()
    assert ada.gain == pytest.approx(gain, rel=1e-9)
    np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_case_22_zero_grad_in_both_ways(set_to_none: bool) -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=2)
    for step in range(3):
        ada.zero_grad(set_to_none=set_to_none)
        gain, parameters = expect_step(model, draw(step, 2), oracle, base=4)
        for batch in draw(step, 2):
            backward(loss_of(model, batch) / 2)
        ada.step()
        assert ada.gain == pytest.approx(gain, rel=1e-9)
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_case_23_add_param_group() -> None:
    model, oracle = make_model(), GainOracle()
    model[2].requires_grad_(False)
    ada = AdaScale(torch.optim.SGD(model[0].parameters(), lr=LR), model, base_batch_size=4, accumulation_steps=2)
    for step in range(3):
        if step == 1:
            model[2].requires_grad_(True)
            ada.add_param_group({"params": model[2].parameters(), "lr": LR})
        gain, parameters = expect_step(model, draw(step, 2), oracle, base=4)
        take_step(ada, model, draw(step, 2))
        assert ada.gain == pytest.approx(gain, rel=1e-9)
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)
