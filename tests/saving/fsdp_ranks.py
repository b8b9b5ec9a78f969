"""Ranks in processes of their own: an FSDP2 model, or a DDP one, that trains the same at any number of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stretto import AdaScale
from stretto.checkpoint import Checkpointer, CheckpointSettings
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainer_run import OPTIMIZERS

Work = Callable[..., dict[str, Any]]

BATCH = 24  # samples per step over all ranks; each of 1..4, 6 and 8 ranks has an equal part


def make_state(mode: str, world_size: int, optimizer: str = "adamw") -> dict[str, Any]:
    """mode: plain, ddp, fsdp, or hsdp (two replicas of shards). Under AdaScale, at S = 1, with a schedule."""
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    if mode == "ddp":
        model = DistributedDataParallel(model)
    elif mode in ("fsdp", "hsdp"):
        shape = (world_size,) if mode == "fsdp" else (2, world_size // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model[0], mesh=mesh)  # type: ignore[index]  # a Sequential
        fully_shard(model, mesh=mesh)
    inner = OPTIMIZERS[optimizer](list(model.parameters()), 0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.99)
    ada = AdaScale(inner, model, base_batch_size=BATCH, batch_size=BATCH // world_size, scheduler=scheduler)
    return {"model": model, "optimizer": ada}


def step(state: dict[str, Any], number: int, rank: int, world_size: int) -> float:
    """One step on this rank's part of a batch that follows from its number; the loss over all of it."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    size = BATCH // world_size
    mine = inputs[rank * size : (rank + 1) * size]
    state["optimizer"].zero_grad()
    loss: Tensor = (state["model"](mine) - mine.sum(dim=1, keepdim=True).sin()).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    state["optimizer"].step()
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    return float(total) / world_size


def work(
    rank: int, world_size: int, mode: str, folder: Path, steps: tuple[int, int], save: bool, optimizer: str
) -> dict[str, Any]:
    state = make_state(mode, world_size, optimizer)
    checkpointer = Checkpointer(folder, settings=CheckpointSettings(part_bytes=150))
    info = checkpointer.load_latest(state) if folder.exists() else None
    losses = [step(state, number, rank, world_size) for number in range(*steps)]
    path = checkpointer.save(state, step=steps[1]) if save else None
    return {"resumed": info.step if info else 0, "losses": losses, "path": path}


def _main(work: Work, rank: int, world_size: int, port: int, output: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        output.write_text(json.dumps(work(rank, world_size, *arguments)))
        dist.destroy_process_group()
    except Exception:  # noqa: BLE001  (the parent process shows it)
        output.write_text(json.dumps({"error": traceback.format_exc()}))
        os._exit(1)


def launch(work: Work, world_size: int, folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What work(rank, world_size, *arguments) says on each of so many ranks; outputs are left beside the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saving.fsdp_ranks"])
    outputs = [folder.with_name(f"{folder.name}-rank-{rank}.json") for rank in range(world_size)]
    processes = [
        context.Process(target=_main, args=(work, rank, world_size, port, outputs[rank], arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    results = [json.loads(output.read_text()) for output in outputs]
    errors = [result["error"] for result in results if "error" in result]
    assert not errors, errors[0]
    return results


def on_processes(
    mode: str, world_size: int, folder: Path, steps: tuple[int, int], *, save: bool, optimizer: str = "adamw"
) -> dict[str, Any]:
    """What rank 0 found: the step that it went on from, and the losses of the steps that follow."""
    results = launch(work, world_size, folder, mode, folder, steps, save, optimizer)
    assert all(result["losses"] == results[0]["losses"] for result in results)
    found: dict[str, Any] = random.choice(results)
    return found
