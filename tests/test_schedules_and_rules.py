"""Rules by their one argument, any torch scheduler along tau, and schedules that are functions of tau."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gain_oracle import GainOracle
from stretto import AdaScale, rules
from stretto.adascale_options import AdaScaleSettings
from stretto.gain import GainEstimator
from torch import nn
from torch.optim import lr_scheduler as schedulers
from toy_regression import LR, backward, gradient_of, loss_of, make, make_batch, make_model, take_step

Inner = torch.optim.Optimizer

SCHEDULERS: dict[str, Callable[[Inner], schedulers.LRScheduler]] = {
    "StepLR": lambda inner: schedulers.StepLR(inner, 2, gamma=0.5),
    "MultiStepLR": lambda inner: schedulers.MultiStepLR(inner, [3, 7], gamma=0.1),
    "ExponentialLR": lambda inner: schedulers.ExponentialLR(inner, 0.9),
    "CosineAnnealingLR": lambda inner: schedulers.CosineAnnealingLR(inner, 20),
    "CosineAnnealingWarmRestarts": lambda inner: schedulers.CosineAnnealingWarmRestarts(inner, 5),
    "LinearLR": lambda inner: schedulers.LinearLR(inner, total_iters=8),
    "PolynomialLR": lambda inner: schedulers.PolynomialLR(inner, total_iters=8),
    "CyclicLR": lambda inner: schedulers.CyclicLR(inner, 0.01, 0.1, step_size_up=4),
    "OneCycleLR": lambda inner: schedulers.OneCycleLR(inner, 0.1, total_steps=12),
    "LambdaLR": lambda inner: schedulers.LambdaLR(inner, lambda t: 1 / (1 + t)),
    "SequentialLR": lambda inner: schedulers.SequentialLR(
        inner, [schedulers.ConstantLR(inner, 0.5, 4), schedulers.ExponentialLR(inner, 0.9)], [5]
    ),
    "ChainedScheduler": lambda inner: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(inner, 0.5, 4), schedulers.ExponentialLR(inner, 0.9)], optimizer=inner
    ),
}


def momentum_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_torch_scheduler_stands_where_that_many_plain_steps_bring_it(name: str) -> None:
    model = make_model()
    inner = momentum_sgd(model)
    scheduler = SCHEDULERS[name](inner)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=3, scheduler=scheduler)
    for step in range(4):
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(3)])
        plain_inner = momentum_sgd(make_model())
        plain = SCHEDULERS[name](plain_inner)
        plain_inner.step()  # torch warns about schedulers that step first
        for _ in range(math.floor(ada.tau)):
            plain.step()
        assert inner.param_groups[0]["lr"] == plain_inner.param_groups[0]["lr"]
    assert ada.tau > 5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_torch_scheduler_is_part_of_the_state(name: str) -> None:
    def fresh() -> tuple[nn.Sequential, AdaScale]:
        model = make_model()
        inner = momentum_sgd(model)
        return model, AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, scheduler=SCHEDULERS[name](inner))

    model, ada = fresh()
    for step in range(3):
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(2)])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "ada": ada.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model, resumed = fresh()
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["ada"])
    for step in range(3, 5):
        for each, its in ((ada, model), (resumed, resumed_model)):
            take_step(each, its, [make_batch(4, 10 * step + j) for j in range(2)])
        assert (resumed.tau, resumed.effective_lr) == (ada.tau, ada.effective_lr)


def test_a_one_cycle_schedule_ends_at_its_end_where_the_last_gain_carries_tau_beyond() -> None:
    model = make_model()
    inner = momentum_sgd(model)
    scheduler = schedulers.OneCycleLR(inner, 0.1, total_steps=6)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=5, scheduler=scheduler, rule="linear")
    rates = []
    for step in range(3):
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(5)])
        rates.append(inner.param_groups[0]["lr"])
    assert ada.tau == 15
    assert rates[1] == rates[2] == pytest.approx(0.1 / 25 / 1e4)


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_function_of_tau_gives_the_rate_at_its_whole_part(tensor_rate: bool) -> None:
    model = make_model()
    rate = torch.tensor(1.0) if tensor_rate else 1.0
    inner = torch.optim.SGD(model.parameters(), lr=rate)
    asked: list[int] = []

    def lr_at(tau: int) -> float:
        asked.append(tau)
        return 0.1 / (1 + tau)

    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=4, scheduler=lr_at)
    for step in range(4):
        tau = ada.tau
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(4)])
        assert ada.effective_lr == pytest.approx([ada.gain * 0.1 / (1 + math.floor(tau))])
    assert all(isinstance(tau, int) for tau in asked)
    assert (inner.param_groups[0]["lr"] is rate) == tensor_rate
    resumed = AdaScale(torch.optim.SGD(model.parameters(), lr=1.0), model, base_batch_size=4, scheduler=lr_at)
    resumed.load_state_dict(ada.state_dict())
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.1 / (1 + math.floor(ada.tau)))


def test_a_function_of_tau_may_give_one_rate_per_group() -> None:
    model = make_model()
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    ada = AdaScale(torch.optim.SGD(groups, lr=1.0), model, base_batch_size=4, scheduler=lambda tau: [0.1, 0.2])
    assert [group["lr"] for group in ada.param_groups] == [0.1, 0.2]
    with pytest.raises(ValueError, match="gave 3 learning rates"):
        AdaScale(ada.optimizer, model, base_batch_size=4, scheduler=lambda tau: [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="allowed: finite numbers"):
        AdaScale(ada.optimizer, model, base_batch_size=4, scheduler=lambda tau: math.nan)
    with pytest.raises(ValueError, match="scheduler is a float"):
        AdaScale(ada.optimizer, model, base_batch_size=4, scheduler=0.1)  # type: ignore[arg-type]  # wrong on purpose


def state(tau: float, **options: Any) -> rules.RuleState:
    return rules.RuleState(GainEstimator(), tau, **options)


def test_lsw_plus_stretches_the_schedule_to_its_steps() -> None:
    tau, factors, options = 0.0, [], {"target_tau": 1000.0, "step_budget": 200}
    for _ in range(200):
        factor, increment = rules.linear_warmup_stretched(state(tau, **options), 8.0)
        factors.append(factor)
        tau += increment
    assert tau == pytest.approx(1000.0)
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(1 + 7 * 5 / 11)  # 5.5 % of 200 steps are 11
    assert factors[11:] == pytest.approx([8.0] * 189)


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("linear_warmup", {}, "target_tau"),
        ("linear_warmup_stretched", {}, "target_tau"),
        ("linear_warmup_stretched", {"target_tau": 10}, "step_budget"),
    ],
)
def test_a_rule_that_lacks_what_it_needs_is_refused_at_once(rule: str, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_model(), rule=rule, settings=AdaScaleSettings(**settings))


def test_each_rule_is_one_argument() -> None:
    settings = AdaScaleSettings(target_tau=100.0, step_budget=50)
    factors = {}
    for rule in ("identity", "linear", "linear_warmup", "linear_warmup_stretched", "sqrt", "adascale"):
        model = make_model()
        ada = make(model, accumulation_steps=4, rule=rule, settings=settings)
        take_step(ada, model, [make_batch(4, j) for j in range(4)])
        factors[rule] = (ada.effective_lr[0] / LR, ada.tau)
    gain = factors["adascale"][0]
    assert 1 < gain < 4
    assert factors == {
        "identity": (1, 1),
        "linear": (4, 4),
        "linear_warmup": (1, 4),
        "linear_warmup_stretched": (1, 2),
        "sqrt": (2, 4),
        "adascale": (pytest.approx(gain), pytest.approx(gain)),
    }


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamscale_takes_the_gain_from_gradients_as_adam_scales_them(optimizer: Any, amsgrad: bool) -> None:
    model, oracle = make_model(), GainOracle()
    inner = optimizer(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-6, amsgrad=amsgrad)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=3, rule="adamscale")
    squares: list[np.ndarray[Any, Any]] = []
    for step in range(9):
        batches = [make_batch(4, 10 * step + j) for j in range(3)]
        gradients = [gradient_of(model, batch) for batch in batches]
        if step >= 5:
            moments = [
                np.sum([0.01 * 0.99 ** (n - 1 - i) * s for i, s in enumerate(squares[:n])], axis=0)
                for n in range(1, step + 1)
            ]
            moment = np.max(moments, axis=0) if amsgrad else moments[-1]
            scale = np.sqrt(moment / (1 - 0.99**step)) + 1e-6
            oracle.update([4, 4, 4], [g / scale for g in gradients], 3.0)
        take_step(ada, model, batches)
        squares.append(np.mean(gradients, axis=0) ** 2)
        gain = oracle.gain(3.0) if step >= 5 else 1.0
        assert ada.gain == pytest.approx(gain, rel=1e-6), f"step {step}"
        assert ada.effective_lr == pytest.approx([0.01 * math.sqrt(gain)])
    assert 1.0 < ada.gain < 3.0


def test_adamscale_leaves_out_elements_that_never_had_a_gradient() -> None:
    table = nn.Embedding(10, 4, dtype=torch.float64)
    ada = AdaScale(
        torch.optim.Adam(table.parameters(), lr=0.01), table, base_batch_size=4, accumulation_steps=2, rule="adamscale"
    )
    for step in range(12):
        ada.zero_grad()
        for j in range(2):
            rows = torch.tensor([0, 1, 2, 3 if step < 10 else 9])  # row 9 has no second moment in step 10
            target = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + j), dtype=torch.float64)
            backward((table(rows) - target).square().mean() / 2)
        ada.step()
        assert ada.variance < 1e3


def test_adamscale_needs_adam() -> None:
    with pytest.raises(ValueError, match="allowed: Adam, AdamW"):
        make(make_model(), rule="adamscale")


def test_a_statistics_interval_leaves_gradients_unmeasured_once_the_averages_are_warm() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2, settings=AdaScaleSettings(statistics_interval=4))
    updates = []
    for step in range(112):
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(2)])
        updates.append(ada.state_dict()["adascale"]["estimator"]["num_updates"])
    assert updates[:100] == list(range(1, 101))
    assert updates[100:] == [100, 100, 100, 101, 101, 101, 101, 102, 102, 102, 102, 103]
    tau, gain = ada.tau, ada.gain
    assert gain > 1
    x, y = make_batch(4, 1)
    for poison in (math.nan, math.inf):  # in unmeasured steps too
        take_step(ada, model, [(x * poison, y), (x, y)])
    assert (ada.skipped_steps, ada.tau) == (2, tau)
    backward(loss_of(model, (x, y)))
