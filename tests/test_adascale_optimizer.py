"""AdaScale as a torch optimizer: schedules, groups, tensor rates, state, closures, GradScaler, errors."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gain_oracle import GainOracle
from stretto import AdaScale, adasum, rules
from stretto.adascale_options import AdaScaleSettings
from torch import Tensor, nn
from toy_regression import (
    LR,
    Batch,
    backward,
    expect_step,
    loss_of,
    make,
    make_batch,
    make_model,
    parameters_of,
    take_step,
)


def test_all_groups_have_one_gain_which_is_also_tau() -> None:
    model = make_model()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.02}]
    ada = AdaScale(torch.optim.SGD(groups), model, base_batch_size=4, accumulation_steps=4)
    take_step(ada, model, [make_batch(4, j) for j in range(4)])
    assert 1 < ada.gain < 4
    assert ada.effective_lr == pytest.approx([0.1 * ada.gain, 0.02 * ada.gain])
    assert ada.tau == ada.gain
    assert [group["lr"] for group in ada.param_groups] == [0.1, 0.02]


def scheduled(model: nn.Module, accumulation_steps: int, rule: str) -> tuple[AdaScale, Any]:
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda t: 1.0 / (1 + t))
    return (
        AdaScale(
            inner,
            model,
            base_batch_size=4,
            accumulation_steps=accumulation_steps,
            scheduler=scheduler,
            rule=rule,
        ),
        scheduler,
    )


@pytest.mark.parametrize(("rule", "count"), [("linear", 5), ("adascale", 6), ("identity", 3)])
def test_the_schedule_is_read_at_the_whole_part_of_tau(rule: str, count: int) -> None:
    model = make_model()
    ada, scheduler = scheduled(model, count, rule)
    for step in range(5):
        tau = ada.tau
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(count)])
        factor = {"linear": float(count), "identity": 1.0, "adascale": ada.gain}[rule]
        assert ada.effective_lr == pytest.approx([factor / (1 + math.floor(tau))])
        assert ada.tau == pytest.approx(tau + factor)
        assert scheduler.last_epoch == math.floor(ada.tau)


def test_a_tensor_learning_rate_is_restored_exactly_also_after_an_error() -> None:
    model = make_model()
    rate = torch.tensor(0.1)
    inner = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=rate, foreach=False
    )
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=3)
    seen: list[float] = []
    inner.register_step_pre_hook(lambda *_: seen.append(float(inner.param_groups[0]["lr"])))
    take_step(ada, model, [make_batch(4, j) for j in range(3)])
    assert seen == pytest.approx([0.1 * ada.gain])  # one tensor for both groups, scaled once
    assert ada.effective_lr == pytest.approx([0.1 * ada.gain] * 2)
    state = json.dumps(ada.state_dict()["adascale"])

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    inner.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        take_step(ada, model, [make_batch(4, j) for j in range(3)])
    assert json.dumps(ada.state_dict()["adascale"]) == state
    assert all(group["lr"] is rate for group in inner.param_groups)
    assert torch.equal(rate, torch.tensor(0.1))


def test_state_is_plain_and_continues_alike() -> None:
    def fresh() -> tuple[nn.Sequential, AdaScale]:
        model = make_model()
        inner = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(inner, [2, 4])
        return model, AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, scheduler=scheduler)

    model, ada = fresh()
    for step in range(3):
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(2)])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "ada": ada.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    json.dumps(saved["ada"]["adascale"])
    resumed_model, resumed = fresh()
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["ada"])
    resumed.rebind(resumed_model, accumulation_steps=4)
    ada.rebind(model, accumulation_steps=4)
    assert (resumed.tau, resumed.gain) == (ada.tau, ada.gain)
    for each, its_model in ((ada, model), (resumed, resumed_model)):
        take_step(each, its_model, [make_batch(4, 50 + j) for j in range(4)])
    assert (resumed.tau, resumed.gain, resumed.effective_lr) == (ada.tau, ada.gain, ada.effective_lr)
    np.testing.assert_array_equal(parameters_of(resumed_model), parameters_of(model))


def test_an_unknown_state_is_refused_and_changes_nothing() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2)
    take_step(ada, model, [make_batch(4, j) for j in range(2)])
    state = ada.state_dict()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"adascale": {**state["adascale"], "format_version": 7}}, "format version 7"),
        ({"adascale": None}, "another optimizer"),
        ({"adascale": 5}, "another optimizer"),
        ({"adascale": {**state["adascale"], "estimator": {}}}, "format version None"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            ada.load_state_dict({**state, **change})
    assert ada.state_dict()["adascale"] == state["adascale"]


def test_a_closure_is_evaluated_once_before_the_gain() -> None:
    models = [make_model(), make_model()]
    adas = [make(model, accumulation_steps=2) for model in models]
    batches = [make_batch(4, j) for j in range(2)]
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        adas[1].zero_grad()
        losses = [loss_of(models[1], batch) / 2 for batch in batches]
        for loss in losses:
            backward(loss)
        return torch.stack(losses).sum()

    take_step(adas[0], models[0], batches)
    loss = adas[1].step(closure)
    assert (len(calls), loss.item() > 0) == (1, True)
    assert adas[1].gain == adas[0].gain > 1
    np.testing.assert_array_equal(parameters_of(models[1]), parameters_of(models[0]))


def scaled_loop(model: nn.Module, ada: AdaScale, scaler: torch.amp.GradScaler, batches: list[Batch]) -> None:
    ada.zero_grad()
    for batch in batches:
        backward(scaler.scale(loss_of(model, batch) / len(batches)))
    scaler.step(ada)
    scaler.update()


def test_a_grad_scaler_changes_neither_statistics_nor_steps() -> None:
    model, plain = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)  # doubles after each step
    ada = make(model, accumulation_steps=2, grad_scaler=scaler)
    reference = make(plain, accumulation_steps=2)
    for step in range(4):
        batches = [make_batch(4, 10 * step + j, torch.float32) for j in range(2)]
        scaled_loop(model, ada, scaler, batches)
        take_step(reference, plain, batches)
        assert ada.variance == pytest.approx(reference.variance, rel=1e-5)
        assert ada.gain == pytest.approx(reference.gain, rel=1e-5)
    np.testing.assert_allclose(parameters_of(model), parameters_of(plain), rtol=1e-5)
    assert scaler.get_scale() == 1024.0 * 16


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_step_that_the_grad_scaler_skips_gives_no_tau(accumulation_steps: int) -> None:
    model = make_model(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ada = make(model, accumulation_steps=accumulation_steps, grad_scaler=scaler)
    good = [make_batch(4, j, torch.float32) for j in range(accumulation_steps)]
    bad = [(x * math.inf, y) for x, y in good]
    scaled_loop(model, ada, scaler, good)
    state = json.dumps(ada.state_dict()["adascale"])
    scaled_loop(model, ada, scaler, bad)
    assert json.dumps(ada.state_dict()["adascale"]) == state
    twin = copy.deepcopy(model)
    batches = [make_batch(4, 20 + j, torch.float32) for j in range(accumulation_steps)]
    scaled_loop(model, ada, scaler, batches)
    oracle = GainOracle()
    for each in (good, batches):
        expect_step(make_model(dtype=torch.float32) if each is good else twin, each, oracle, base=4)
    assert ada.gain == pytest.approx(oracle.gain(float(accumulation_steps)), rel=1e-4)


def test_it_is_an_optimizer_to_torch() -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    ada = AdaScale(inner, model, base_batch_size=4)
    assert isinstance(ada, torch.optim.Optimizer)
    calls: list[str] = []
    ada.register_step_pre_hook(lambda *_: calls.append("before"))
    ada.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(ada, 1, gamma=0.1)
    take_step(ada, model, [make_batch(4, 0)])
    scheduler.step()
    assert calls == ["before", "after"]
    assert inner.param_groups[0]["lr"] == pytest.approx(LR / 10)
    assert ada.param_groups is inner.param_groups
    assert ada.state is inner.state
    assert "lr" in repr(ada)


def test_agreement_on_one_process_is_what_was_set() -> None:
    model = make_model()
    ada = make(model)
    ada.set_agreement([1.0, 7.0])
    take_step(ada, model, [make_batch(4, 0)])
    assert ada.agreed == [1.0, 7.0]


def test_unbound_steps_are_refused_and_rebinding_goes_on() -> None:
    model = make_model()
    ada = make(model, accumulation_steps=2)
    take_step(ada, model, [make_batch(4, j) for j in range(2)])
    tau, variance = ada.tau, ada.variance
    ada.unbind()
    with pytest.raises(RuntimeError, match="rebind"):
        ada.step()
    ada.rebind(model)
    assert (ada.tau, ada.variance) == (tau, variance)
    take_step(ada, model, [make_batch(4, j) for j in range(2)])
    assert ada.tau == pytest.approx(tau + ada.gain)


def test_warmup_follows_tau() -> None:
    model = make_model()
    ada = make(
        model,
        accumulation_steps=4,
        rule=rules.linear_warmup,
        settings=AdaScaleSettings(target_tau=16 / rules.WARMUP_FRACTION),
    )
    rates = []
    for step in range(6):
        take_step(ada, model, [make_batch(4, 10 * step + j) for j in range(4)])
        rates.append(ada.effective_lr[0] / LR)
    assert rates == pytest.approx([1.0, 1.75, 2.5, 3.25, 4.0, 4.0])


def test_sizes_may_be_numpys_whole_numbers() -> None:
    model = make_model()
    ada = make(model, base_batch_size=np.int64(4), batch_size=np.int32(8))
    take_step(ada, model, [make_batch(8, 0)])
    assert ada.scale == 2.0
    json.dumps(ada.state_dict()["adascale"])


def bad_constructions() -> dict[str, tuple[Callable[[], Any], str]]:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    other = torch.optim.SGD(make_model().parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler
    lbfgs = torch.optim.LBFGS(model.parameters())
    deltas = adasum.DeltaOptimizer(torch.optim.SGD(model.parameters(), lr=LR))
    plateau = schedule.ReduceLROnPlateau(inner)

    def build(optimizer: Any = inner, **options: Any) -> Callable[[], Any]:
        options.setdefault("base_batch_size", 4)
        return lambda: AdaScale(optimizer, model, **options)

    return {
        "base missing": (lambda: AdaScale(inner, model), "base_batch_size"),  # type: ignore[call-arg]  # on purpose
        "base None": (build(base_batch_size=None), "base_batch_size is None"),
        "base 0": (build(base_batch_size=0), "base_batch_size is 0"),
        "base 1.5": (build(base_batch_size=1.5), "base_batch_size is 1.5"),
        "batch -1": (build(batch_size=-1), "batch_size is -1"),
        "accumulation 0": (build(accumulation_steps=0), "accumulation_steps is 0"),
        "not an optimizer": (build(optimizer=model), "is a Sequential"),
        "wrapped twice": (build(optimizer=make(model)), "is an AdaScale already"),
        "Adasum's deltas": (lambda: AdaScale(deltas, model, base_batch_size=4), "with any other rule"),
        "Adasum's hook": (build(comm_hook=adasum.ddp_hook), "one of them only"),
        "no parameters": (lambda: AdaScale(inner, nn.Identity(), base_batch_size=4), "model has no parameters"),
        "another model": (build(optimizer=other), "are not the model's"),
        "another schedule": (build(scheduler=schedule.StepLR(other, 1)), "belongs to another optimizer"),
        "plateau": (build(scheduler=plateau), "follows a metric"),
        "closures": (build(optimizer=lbfgs), "evaluates its closure several times"),
        "rule": (build(rule="best"), "rule is 'best'"),
        "no model": (lambda: AdaScale(inner, None, base_batch_size=4), "model is a NoneType"),  # type: ignore[arg-type]  # on purpose
    }


@pytest.mark.parametrize("name", bad_constructions())
def test_bad_arguments_are_refused_with_what_is_allowed(name: str) -> None:
    construct, message = bad_constructions()[name]
    with pytest.raises((ValueError, TypeError), match=message):
        construct()
