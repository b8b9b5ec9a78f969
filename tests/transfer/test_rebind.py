"""What AdaScale forgets when it is bound anew in the middle of a step, on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stretto import AdaScale
from torch import nn
from toy_regression import LR, backward, loss_of, make_batch, make_model, parameters_of


def train(*, broken_at: str, accumulation: int, scaled: bool) -> tuple[list[float], float, float]:
    """Three steps; the second is given up at this point once, and taken anew after a rebind."""
    model = make_model(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
    optimizer = AdaScale(
        torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        model,
        base_batch_size=4,
        accumulation_steps=accumulation,
        grad_scaler=scaler,
    )
    for step in range(3):
        if step == 1 and broken_at:
            take_step(step, model, optimizer, scaler, accumulation, until=broken_at)
            optimizer.rebind(model)
        take_step(step, model, optimizer, scaler, accumulation, until="")
    return parameters_of(model).tolist(), optimizer.tau, float(scaler.get_scale())


def take_step(step: int, model: nn.Module, optimizer: AdaScale, scaler: Any, accumulation: int, *, until: str) -> None:
    for micro in range(accumulation):
        n = 3 + micro
        optimizer.set_num_samples(n, total=sum(3 + m for m in range(accumulation)))
        if until == "count":
            return
        loss = loss_of(model, make_batch(n, 10 * step + micro, torch.float32)) / accumulation
        backward(scaler.scale(loss))
        if until == "first_backward":
            return
    if until == "backward":
        return
    scaler.unscale_(optimizer)
    if until == "unscaled":
        return
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("broken_at", ["count", "first_backward", "backward", "unscaled"])
def test_a_step_after_rebind_is_what_it_would_have_been(broken_at: str, accumulation: int, scaled: bool) -> None:
    undisturbed = train(broken_at="", accumulation=accumulation, scaled=scaled)
    assert train(broken_at=broken_at, accumulation=accumulation, scaled=scaled) == undisturbed


def test_unbind_drops_the_gradients_which_may_be_memory_that_a_dying_collective_writes_to() -> None:
    model = make_model()
    optimizer = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), model, base_batch_size=4)
    backward(loss_of(model, make_batch(4, 1)))
    optimizer.unbind()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scaler_that_was_never_used_does_not_mind() -> None:
    model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), model, base_batch_size=4, grad_scaler=scaler)
    optimizer.rebind(model)
    assert scaler.get_scale() == 8.0
