"""Runs an ElasticTrainer on a small problem, in this process or as gloo ranks in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from stretto.trainer import ElasticTrainer, StepReport
from stretto.trainer_settings import TrainerSettings
from torch.utils.data import TensorDataset

SAMPLES = 50
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]] = {
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
}


@dataclass(frozen=True)
class Plan:
    """What to run. `steps`: break after so many in this run; `save`: write a checkpoint before that."""

    target_tau: float = 40.0
    base_batch_size: int = 4
    batch_size: int = 4
    global_batch_size: int | None = None
    steps: int | None = None
    save: bool = False
    checkpoint: str | None = None
    dropout: float = 0.0
    rule: str = "adascale"
    lr: float = 0.05
    optimizer: str = "momentum"
    settings: dict[str, Any] = field(default_factory=dict)


def make_dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True).sin() + noise)


def make_trainer(plan: Plan, dataset: Any = None) -> ElasticTrainer:
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # ranks differ on purpose: rank 0's weights count
    layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(plan.dropout), torch.nn.Linear(8, 1)]
    model = torch.nn.Sequential(*layers).double()
    optimizer = OPTIMIZERS[plan.optimizer](list(model.parameters()), plan.lr)
    return ElasticTrainer(
        model,
        optimizer,
        dataset or make_dataset(),
        lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]),
        base_batch_size=plan.base_batch_size,
        batch_size=plan.batch_size,
        target_tau=plan.target_tau,
        global_batch_size=plan.global_batch_size,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98),
        checkpoint=plan.checkpoint,
        rule=plan.rule,
        settings=TrainerSettings(checkpoint_interval_s=None, **plan.settings),
    )


def train(plan: Plan, dataset: Any = None) -> tuple[list[StepReport], list[float]]:
    """All reports of a run, and the parameters after it."""
    trainer = make_trainer(plan, dataset)
    reports = []
    for report in trainer:
        reports.append(report)
        if plan.steps is not None and len(reports) >= plan.steps:
            if plan.save:
                trainer.save()
            break
    flat = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return reports, flat.tolist()


def train_on_ranks(plan: Plan, world_size: int, directory: Path) -> tuple[list[StepReport], list[float]]:
    """The same on `world_size` processes; checks that all ranks agree bit by bit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["stretto.trainer"])
    outputs = [directory / f"rank-{rank}.json" for rank in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(plan, rank, world_size, port, str(outputs[rank])))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"exit codes {codes}"
    results = [json.loads(output.read_text()) for output in outputs]
    assert all(result == results[0] for result in results), "the ranks disagree"
    reports = [StepReport(**{**entry, "effective_lr": tuple(entry["effective_lr"])}) for entry in results[0]["reports"]]
    return reports, results[0]["parameters"]


def _rank(plan: Plan, rank: int, world_size: int, port: int, output: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    reports, parameters = train(plan)
    Path(output).write_text(json.dumps({"reports": [asdict(report) for report in reports], "parameters": parameters}))
