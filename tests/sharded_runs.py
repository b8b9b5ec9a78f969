"""One loop for DDP, FSDP2 and HSDP on the same data, for comparing their gains."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toy_regression import backward, make_batch

Sizes = tuple[tuple[int, ...], ...]  # per rank, per micro-batch


@dataclass(frozen=True)
class Run:
    """Steps of a small model; every batch follows from (step, rank, micro-batch)."""

    steps: tuple[Sizes, ...]
    accumulation: int = 1
    announce: str = ""
    sync: str = "last"  # or "each": gradients meet in every micro-batch
    dtype: torch.dtype = torch.float32
    scaler: bool = False
    poisoned: int = -1
    clip: bool = False
    frozen: bool = False
    reduce_dtype: torch.dtype | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Blocks(nn.Module):
    """Layers of odd sizes, so that shards are padded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(7, 5), nn.Tanh())
        self.head = nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x)))
        return out


def wrap(kind: str, model: Blocks, run: Run) -> nn.Module:
    """The model under DDP, FSDP2, or HSDP on two replicas of two shards."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    shape, names = ((2, 2), ("replicate", "shard")) if kind == "hsdp" else ((dist.get_world_size(),), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(reduce_dtype=run.reduce_dtype)
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def synchronised(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        return contextlib.nullcontext()
    assert isinstance(model, DistributedDataParallel)
    return contextlib.nullcontext() if now else model.no_sync()


def take_run(kind: str, run: Run, rank: int) -> dict[str, Any]:
    """Gains, taus and final parameters on this rank of the default group."""
    bare = Blocks(run.dtype)
    if run.frozen:
        bare.first[0].bias.requires_grad_(False)
    model = wrap(kind, bare, run)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=run.scaler)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ada = AdaScale(
        inner,
        model,
        base_batch_size=4,
        batch_size=4,
        accumulation_steps=run.accumulation,
        grad_scaler=scaler,
        settings=AdaScaleSettings(**run.settings),
    )
    gains, taus, statistics = [], [], []
    for step, sizes in enumerate(run.steps):
        ada.zero_grad()
        for micro, size in enumerate(sizes[rank]):
            if run.announce:
                ada.set_num_samples(size, sum(map(sum, sizes)) if run.announce == "total" else None)
            x, y = make_batch(size, 1000 * step + 100 * rank + micro, run.dtype)
            if step == run.poisoned and rank == 0:
                x = x * torch.inf
            with synchronised(model, micro == len(sizes[rank]) - 1 or run.sync == "each"):
                loss = nn.functional.mse_loss(model(x), y) / run.accumulation
                backward(scaler.scale(loss))
        if run.clip:
            scaler.unscale_(inner)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(ada)
        scaler.update()
        gains.append(ada.gain)
        taus.append(ada.tau)
        statistics.append((ada.variance, ada.sqr_norm))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in whole]).double().numpy().copy()
    return {"gains": gains, "taus": taus, "statistics": statistics, "parameters": flat, "skipped": ada.skipped_steps}
