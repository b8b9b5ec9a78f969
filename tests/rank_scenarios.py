"""What ranks do in the distributed tests of AdaScale, and what a single process computes they should get."""

from __future__ import annotations

import contextlib
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gain_oracle import GainOracle, Vector
from stretto import AdaScale
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import (
    LR,
    Batch,
    backward,
    gradient_of,
    loss_of,
    make_batch,
    make_model,
    parameters_of,
)

Sizes = tuple[tuple[int, ...], ...]  # per rank, per micro-batch


@dataclass(frozen=True)
class Scenario:
    """A run of steps; every batch follows from (step, rank, micro-batch)."""

    steps: tuple[Sizes, ...]
    base: int = 4
    batch: int = 4
    accumulation: int = 1
    announce: str = ""  # "total", "count", or nothing
    no_sync: bool = True  # for all but the last micro-batch
    poisoned: int = -1  # the step in which rank 0 sees NaN
    ddp: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one rank saw after each step."""

    gains: list[float] = field(default_factory=list)
    taus: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    parameters: list[Vector] = field(default_factory=list)
    agreed: list[list[float]] = field(default_factory=list)
    skipped: int = 0


def batch_of(step: int, rank: int, micro: int, size: int) -> Batch:
    return make_batch(size, 1000 * step + 100 * rank + micro)


def run(scenario: Scenario, rank: int) -> Outcome:
    """Run a scenario on this rank of the default group."""
    model = make_model()
    wrapped = DistributedDataParallel(model, **scenario.ddp)
    ada = AdaScale(
        torch.optim.SGD(model.parameters(), lr=LR),
        wrapped,
        base_batch_size=scenario.base,
        batch_size=scenario.batch,
        accumulation_steps=scenario.accumulation,
    )
    outcome = Outcome()
    for step, sizes in enumerate(scenario.steps):
        run_step(scenario, ada, wrapped, step, sizes, rank)
        outcome.gains.append(ada.gain)
        outcome.taus.append(ada.tau)
        outcome.scales.append(ada.scale)
        outcome.parameters.append(parameters_of(model))
        outcome.agreed.append(ada.agreed)
    outcome.skipped = ada.skipped_steps
    return outcome


def run_step(scenario: Scenario, ada: AdaScale, wrapped: nn.Module, step: int, sizes: Sizes, rank: int) -> None:
    """One step of this rank's loop."""
    ada.zero_grad()
    ada.set_agreement([1.0, float(rank), float(step == 1 or rank == 0)])
    own = sizes[rank]
    for micro, size in enumerate(own):
        if scenario.announce:
            ada.set_num_samples(size, sum(map(sum, sizes)) if scenario.announce == "total" else None)
        x, y = batch_of(step, rank, micro, size)
        if step == scenario.poisoned and rank == 0:
            x = x * math.nan
        last = micro == len(own) - 1
        with no_sync(wrapped) if scenario.no_sync and not last else contextlib.nullcontext():
            backward(loss_of(wrapped, (x, y)) / scenario.accumulation)
    ada.step()


def no_sync(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Of a DDP model; a bare one has nobody to synchronise with."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()


def expect(scenario: Scenario) -> Outcome:
    """The same scenario on one process, from every micro-batch's gradient."""
    model, oracle, outcome, tau = make_model(), GainOracle(), Outcome(), 0.0
    gain, scale = 1.0, 0.0
    for step, sizes in enumerate(scenario.steps):
        gradients = [
            [gradient_of(model, batch_of(step, rank, j, n)) if n else None for j, n in enumerate(own)]
            for rank, own in enumerate(sizes)
        ]
        flat = [(n, g) for own, row in zip(sizes, gradients, strict=True) for n, g in zip(own, row, strict=True)]
        samples = sum(n for n, _ in flat)
        divisor = samples if scenario.announce else len(sizes) * scenario.accumulation * scenario.batch
        applied = np.sum([n * g for n, g in flat if g is not None], axis=0) / divisor
        if step != scenario.poisoned:
            scale = samples / scenario.base
            _update(oracle, scenario, sizes, gradients, scale)
            gain = oracle.gain(scale)
            tau += gain
            _move(model, -LR * gain * applied)
        else:
            outcome.skipped += 1
        outcome.gains.append(gain)
        outcome.taus.append(tau)
        outcome.scales.append(scale)
        outcome.parameters.append(parameters_of(model))
    return outcome


def _update(
    oracle: GainOracle, scenario: Scenario, sizes: Sizes, gradients: list[list[Vector | None]], scale: float
) -> None:
    if len(sizes) == 1:  # on one process each micro-batch is a contribution
        pairs = [(n, g) for n, g in zip(sizes[0], gradients[0], strict=True) if g is not None]
        oracle.update([n for n, _ in pairs], [g for _, g in pairs], scale)
        return
    if scenario.accumulation > 1 and not scenario.no_sync:
        # Each synchronised micro-batch shows how the ranks differ in it; the differences add up.
        columns = [np.stack([row[j] for row in gradients]) / len(sizes[0]) for j in range(len(sizes[0]))]  # type: ignore[misc]  # no empty ones here
        spread = sum(float(((c - c.mean(axis=0)) ** 2).sum(axis=1).mean()) for c in columns)
        mean = np.sum([c.mean(axis=0) for c in columns], axis=0)
        oracle.update_from(spread, float(mean @ mean), len(sizes), scale)
        return
    per_rank = [sum(own) for own in sizes]
    means = [
        np.sum([n * g for n, g in zip(own, row, strict=True) if g is not None], axis=0) / max(sum(own), 1)
        for own, row in zip(sizes, gradients, strict=True)
    ]
    oracle.update(per_rank, means, scale)


def _move(model: nn.Module, change: Vector) -> None:
    offset = 0
    with torch.no_grad():
        for parameter in model.parameters():
            part = change[offset : offset + parameter.numel()].reshape(parameter.shape)
            parameter.add_(torch.from_numpy(part))
            offset += parameter.numel()


def in_ranks(rank: int, world_size: int, folder: str, work: Callable[[int], dict[str, Any]]) -> None:
    """Entry of a spawned rank: joins the group, runs `work`, leaves its results (or the error) in a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        results: dict[str, Any] = work(rank)
    except Exception:
        results = {"error": traceback.format_exc()}
        raise
    finally:
        torch.save(results, f"{folder}/rank-{rank}.pt")
        if "error" not in results:
            dist.destroy_process_group()
