"""Elastic training of a small MLP on scikit-learn's digits: the learning rate stays right at any number of workers.

    python examples/digits.py                                        # alone
    stretto run --nnodes 1:4 --nproc-per-node 2 examples/digits.py   # elastic, with a controller of its own
    torchrun --rdzv-backend=stretto --rdzv-endpoint=127.0.0.1:29400 --rdzv-conf=reconfigure=in-process \
             --rdzv-id=digits --nnodes=1:4 --nproc-per-node=1 --max-restarts=100 examples/digits.py
"""

from __future__ import annotations

import os
import sys

import stretto
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def loss_fn(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return torch.nn.functional.cross_entropy(model(images), labels)


def main(checkpoint: str = "checkpoints/digits") -> None:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Written for batches of 16: AdaScale reads it at floor(tau) and scales it by the gain.
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / 1600))
    trainer = stretto.ElasticTrainer(
        model,
        optimizer,
        data,
        loss_fn,
        base_batch_size=16,
        batch_size=16,
        target_tau=1600,
        scheduler=scheduler,
        checkpoint=checkpoint,
    )
    for report in trainer:
        if report.step % 200 == 0 and os.environ.get("RANK", "0") == "0":
            print(
                f"step {report.step}: tau {report.tau:.0f}, S {report.scale:g}, gain {report.gain:.2f}, "
                f"loss {report.loss:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
