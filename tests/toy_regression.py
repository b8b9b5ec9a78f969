"""A small float64 regression, and what one AdaScale step on it should do, computed anew each time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gain_oracle import GainOracle, Vector
from stretto import AdaScale
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
LR = 0.05


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def make_batch(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(size, 2, generator=generator, dtype=torch.float64) + x[:, :2]
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch's is untyped


def gradient_of(model: nn.Module, batch: Batch) -> Vector:
    """The mean gradient of a batch, flat, computed on a copy that nothing else has touched."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    backward(loss_of(twin, batch))
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in twin.parameters()])
    vector: Vector = flat.double().numpy().copy()
    return vector


def parameters_of(model: nn.Module) -> Vector:
    vector: Vector = torch.cat([p.detach().flatten() for p in model.parameters()]).double().cpu().numpy().copy()
    return vector


def make(model: nn.Module, **options: Any) -> AdaScale:
    options.setdefault("base_batch_size", 4)
    return AdaScale(torch.optim.SGD(model.parameters(), lr=LR), model, **options)


def take_step(ada: AdaScale, model: nn.Module, batches: list[Batch], divide_by: float | None = None) -> None:
    """One step in the usual way: each loss divided by the number of micro-batches."""
    ada.zero_grad()
    for batch in batches:
        backward(loss_of(model, batch) / (divide_by or len(batches)))
    ada.step()


def expect_step(model: nn.Module, batches: list[Batch], oracle: GainOracle, base: int) -> tuple[float, Vector]:
    """The gain and the parameters that one step should end with."""
    sizes = [len(batch[0]) for batch in batches]
    gradients = [gradient_of(model, batch) for batch in batches]
    scale = sum(sizes) / base
    oracle.update(sizes, gradients, scale)
    mean = np.average(np.stack(gradients), axis=0, weights=sizes)
    gain = oracle.gain(scale)
    return gain, parameters_of(model) - LR * gain * mean
