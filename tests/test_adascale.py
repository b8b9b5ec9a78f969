"""AdaScale's statistics on one process: micro-batches against a twin that computes each gradient anew."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gain_oracle import GainOracle
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from torch import Tensor, nn
from toy_regression import (
    LR,
    backward,
    expect_step,
    gradient_of,
    loss_of,
    make,
    make_batch,
    make_model,
    parameters_of,
    take_step,
)


def test_accumulated_micro_batches_are_contributions() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=4)
    tau = 0.0
    for step in range(6):
        batches = [make_batch(4, 10 * step + j) for j in range(4)]
        gain, parameters = expect_step(model, batches, oracle, base=4)
        take_step(ada, model, batches)
        tau += gain
        assert ada.gain == pytest.approx(gain, rel=1e-9)
        assert ada.tau == pytest.approx(tau, rel=1e-9)
        assert (ada.variance, ada.sqr_norm) == pytest.approx(oracle.averages(), rel=1e-9)
        assert ada.scale == 4.0
        assert ada.effective_lr == pytest.approx([LR * gain])
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_unequal_micro_batches_are_weighted_by_their_samples() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, batch_size=8, base_batch_size=8, accumulation_steps=3)
    for step, sizes in enumerate([(8, 8, 8), (8, 2, 5), (1, 1, 30)]):
        batches = [make_batch(n, 10 * step + j) for j, n in enumerate(sizes)]
        gain, parameters = expect_step(model, batches, oracle, base=8)
        ada.zero_grad()
        for n, batch in zip(sizes, batches, strict=True):
            ada.set_num_samples(n, total=sum(sizes))
            backward(loss_of(model, batch) / 3)
        ada.step()
        assert ada.scale == sum(sizes) / 8
        assert ada.gain == pytest.approx(gain, rel=1e-9)
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_an_empty_micro_batch_counts_for_nothing() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=3)
    batches = [make_batch(4, 1), make_batch(2, 2)]
    gain, parameters = expect_step(model, batches, oracle, base=4)
    for batch in [batches[0], make_batch(0, 3), batches[1]]:  # the mean loss over no samples is NaN
        ada.set_num_samples(len(batch[0]), total=6)
        backward(loss_of(model, batch) / 3)
    ada.step()
    assert ada.gain == pytest.approx(gain, rel=1e-9)
    np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_a_count_that_changes_between_windows_keeps_gain_and_tau_right() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=2)
    tau = 0.0
    for step, count in enumerate([2, 2, 8, 3, 1, 1, 2, 5]):
        ada.rebind(model, accumulation_steps=count)
        batches = [make_batch(4, 100 * step + j) for j in range(count)]
        gain, parameters = expect_step(model, batches, oracle, base=4)
        take_step(ada, model, batches)
        tau += gain
        assert ada.gain == pytest.approx(gain, rel=1e-9), f"step {step}"
        assert ada.tau == pytest.approx(tau, rel=1e-9)
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_a_short_last_window_has_its_own_scale_and_gain() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=4)
    for step, count in enumerate([4, 3, 4]):
        batches = [make_batch(4, 10 * step + j) for j in range(count)]
        gain, _ = expect_step(model, batches, oracle, base=4)
        take_step(ada, model, batches, divide_by=4)
        assert ada.scale == count
        assert ada.gain == pytest.approx(gain, rel=1e-9)


def test_losses_that_are_summed_over_micro_batches_give_the_same_gain() -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=3, settings=AdaScaleSettings(accumulated_loss="sum"))
    batches = [make_batch(4, j) for j in range(3)]
    gain, _ = expect_step(model, batches, oracle, base=4)
    take_step(ada, model, batches, divide_by=1)
    assert ada.gain == pytest.approx(gain, rel=1e-9)
    assert ada.variance == pytest.approx(oracle.averages()[0], rel=1e-9)


@pytest.mark.parametrize(("base", "scale"), [(3, 8 / 3), (32, 0.25), (7, 8 / 7)])
def test_scales_need_not_be_whole_or_above_one(base: int, scale: float) -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, base_batch_size=base, batch_size=4, accumulation_steps=2)
    for step in range(3):
        batches = [make_batch(4, 10 * step + j) for j in range(2)]
        gain, _ = expect_step(model, batches, oracle, base=base)
        take_step(ada, model, batches)
        assert (ada.scale, ada.gain) == pytest.approx((scale, gain), rel=1e-9)
        assert min(1, scale) <= ada.gain <= max(1, scale)


def test_one_contribution_at_another_scale_has_a_gain_of_one_until_there_are_statistics() -> None:
    model = make_model()
    ada = make(model, batch_size=16)
    take_step(ada, model, [make_batch(16, 0)])
    assert (ada.scale, ada.gain, ada.tau) == (4.0, 1.0, 1.0)


def test_zero_gradients_give_a_gain_of_one_and_move_nothing() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2)
    before = parameters_of(model)
    for _ in range(2):
        backward(model(make_batch(4, 1)[0]).sum() * 0.0)
    ada.step()
    assert (ada.gain, ada.tau) == (1.0, 1.0)
    np.testing.assert_array_equal(parameters_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gain_of_tiny_gradients_is_that_of_large_ones(dtype: torch.dtype) -> None:
    gains = []
    for unit in (1.0, 1e-22):
        model = make_model(dtype=dtype)
        ada = make(model, accumulation_steps=2)
        ada.zero_grad()
        for j in range(2):
            backward(loss_of(model, make_batch(4, j, dtype)) * (unit / 2))
        ada.step()
        gains.append(ada.gain)
    assert gains[0] > 1.05
    assert gains[1] == pytest.approx(gains[0], rel=1e-5)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_step_touches_nothing(accumulation_steps: int, poison: float) -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=accumulation_steps, scheduler=scheduler)
    take_step(ada, model, [make_batch(4, j) for j in range(accumulation_steps)])
    parameters, state = parameters_of(model), json.dumps(ada.state_dict()["adascale"])
    x, y = make_batch(4, 9)
    take_step(ada, model, [(x * poison, y)] * accumulation_steps)
    assert ada.skipped_steps == 1
    assert json.dumps(ada.state_dict()["adascale"]) == state
    np.testing.assert_array_equal(parameters_of(model), parameters)
    take_step(ada, model, [make_batch(4, j) for j in range(accumulation_steps)])
    assert ada.skipped_steps == 1
    assert np.isfinite(parameters_of(model)).all()


def test_clipping_does_not_reach_the_statistics() -> None:
    gains = []
    for clip in (False, True):
        model = make_model()
        ada = make(model, accumulation_steps=2)
        for j in range(2):
            backward(loss_of(model, make_batch(4, j)) / 2)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        ada.step()
        gains.append((ada.gain, ada.variance, ada.sqr_norm))
    assert gains[0] == gains[1]


def test_frozen_and_unused_parameters_do_not_matter() -> None:
    model, oracle = make_model(), GainOracle()
    model.register_module("unused", nn.Linear(3, 3, dtype=torch.float64))
    model[0].weight.requires_grad_(False)
    forward: Callable[[Tensor], Tensor] = nn.Sequential(*list(model.children())[:3])
    ada = make(model, accumulation_steps=2)
    for step in range(3):
        if step == 2:
            model[2].bias.requires_grad_(False)  # frozen later
        batches = [make_batch(4, 10 * step + j) for j in range(2)]
        twin = copy.deepcopy(forward)
        gradients = [gradient_of(twin, batch) for batch in batches]  # type: ignore[arg-type]  # a Sequential
        oracle.update([4, 4], gradients, 2.0)
        ada.zero_grad()
        for x, y in batches:
            backward(nn.functional.mse_loss(forward(x), y) / 2)
        ada.step()
        assert ada.gain == pytest.approx(oracle.gain(2.0), rel=1e-9)


def test_a_parameter_that_is_unfrozen_later_is_counted() -> None:
    model, oracle = make_model(), GainOracle()
    model[0].weight.requires_grad_(False)
    ada = make(model, accumulation_steps=2)
    for step in range(3):
        if step == 1:
            model[0].weight.requires_grad_(True)
        batches = [make_batch(4, 10 * step + j) for j in range(2)]
        gain, _ = expect_step(model, batches, oracle, base=4)
        take_step(ada, model, batches)
        assert ada.gain == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forgets_what_was_half_collected(set_to_none: bool) -> None:
    model, oracle = make_model(), GainOracle()
    ada = make(model, accumulation_steps=2)
    for step in range(3):
        backward(loss_of(model, make_batch(4, 99)) / 2)  # abandoned
        ada.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        batches = [make_batch(4, 10 * step + j) for j in range(2)]
        gain, parameters = expect_step(model, batches, oracle, base=4)
        for batch in batches:
            backward(loss_of(model, batch) / 2)
        ada.step()
        ada.zero_grad(set_to_none=set_to_none)
        assert ada.gain == pytest.approx(gain, rel=1e-9)
        np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)


def test_an_added_group_is_counted_from_its_first_step() -> None:
    model, oracle = make_model(), GainOracle()
    inner = torch.optim.SGD(model[0].parameters(), lr=LR)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2)
    ada.add_param_group({"params": model[2].parameters(), "lr": LR})
    batches = [make_batch(4, j) for j in range(2)]
    gain, parameters = expect_step(model, batches, oracle, base=4)
    take_step(ada, model, batches)
    assert ada.gain == pytest.approx(gain, rel=1e-9)
    assert len(ada.param_groups) == len(inner.param_groups) == 2
    np.testing.assert_allclose(parameters_of(model), parameters, rtol=1e-9)
    with pytest.raises(ValueError, match="are not the model's"):
        ada.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_sample_counts_are_checked() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2)
    for arguments, message in [
        ((-1, 4), "n is -1"),
        ((2.5, 4), "n is 2.5"),
        ((4, 0), "total is 0"),
        ((4, 3), "less than this micro-batch's own"),
        ((4,), "total is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            ada.set_num_samples(*arguments)  # type: ignore[arg-type]  # wrong on purpose


def test_a_total_that_is_not_the_samples_used_stops_the_step() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2)
    before = parameters_of(model)
    for totals, message in [((9, 9), "total is 9, but the ranks used 8"), ((8, 9), "the same total")]:
        ada.zero_grad()
        for j, total in enumerate(totals):
            ada.set_num_samples(4, total=total)
            backward(loss_of(model, make_batch(4, j)) / 2)
        with pytest.raises(ValueError, match=message):
            ada.step()
    np.testing.assert_array_equal(parameters_of(model), before)
    assert ada.tau == 0.0
