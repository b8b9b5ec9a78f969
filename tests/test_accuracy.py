"""AdaScale keeps the accuracy of S = 1 at S = 32 with one schedule, where linear scaling with warm-up does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import Problem, digits, mean_accuracy, mnist, train


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(problem: Problem, seeds: int) -> None:
    accuracies = {}
    for scale, rule in ((1, "adascale"), (32, "adascale"), (32, "linear_warmup")):
        results = [train(problem, scale=scale, rule=rule, seed=seed) for seed in range(seeds)]
        accuracies[scale, rule] = mean_accuracy(results)
        steps = [result.steps for result in results]
        print(
            f"{problem.name}, seeds 0 to {seeds - 1}: {rule} at S = {scale}: {accuracies[scale, rule]:.2f} in {steps}"
        )
    alone = accuracies[1, "adascale"]
    assert accuracies[32, "adascale"] > alone - 1.0
    assert accuracies[32, "linear_warmup"] < alone - 1.0


@pytest.mark.timeout(600)  # 20 s of an idle core
def test_digits_are_learned_as_well_at_a_scale_of_32() -> None:
    compare(digits(), seeds=3)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_mnist_is_learned_as_well_at_a_scale_of_32() -> None:
    compare(mnist(), seeds=3)
