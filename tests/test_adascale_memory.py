"""What a step with AdaScale allocates, counted operation by operation, beside plain DDP's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paired_steps import bytes_made, reduce_at_once
from rank_scenarios import in_ranks
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import backward

WIDTH = 300
SETTINGS = {"each step": AdaScaleSettings(), "every second step": AdaScaleSettings(statistics_interval=2)}


def allocated(make: Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]], size: int) -> int:
    """By the backward and step after three others."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    model, optimizer = make(bare)
    made = 0
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(size, WIDTH)).sum()

        def train(loss: Any = loss) -> None:
            backward(loss)
            optimizer.step()

        made = bytes_made(torch.device("cpu"), train)
    return made


def plain(bare: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return DistributedDataParallel(bare), torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9)


def scaled(settings: AdaScaleSettings) -> Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]:
    def make(bare: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, inner = plain(bare)
        optimizer = AdaScale(inner, model, base_batch_size=4, settings=settings)
        model = DistributedDataParallel(bare)
        optimizer.rebind(model, all_reduce=reduce_at_once)
        return model, optimizer

    return make


def work(rank: int) -> dict[str, Any]:
    size = 4 + rank
    return {"plain": allocated(plain, size)} | {name: allocated(scaled(each), size) for name, each in SETTINGS.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder: Path = tmp_path_factory.mktemp("memory")
    spawn(in_ranks, (2, str(folder), work), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
    found: dict[str, int] = torch.load(folder / "rank-0.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_copies_no_gradients(name: str, made: dict[str, int]) -> None:
    size_bytes = 4 * 2 * (WIDTH * WIDTH + WIDTH)
    assert made["plain"] >= size_bytes  # the count sees what backward makes
    assert made[name] - made["plain"] < 0.01 * size_bytes
