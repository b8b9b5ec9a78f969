"""Corners of plain DDP loops: collectives and their order, hooks of torch's own, and backwards within backwards.

Each function is run by all ranks of the default group and raises where AdaScale is wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_loop import SIZE, Loop, ddp
from gain_oracle import GainOracle
from stretto import AdaScale
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toy_regression import LR, backward, gradient_of, loss_of, make_model


def collectives() -> int:
    """How many this rank has started in the default group."""
    group: Any = dist.group.WORLD
    number: int = group._get_sequence_number_for_group()
    return number


def one_collective_more_than_plain_ddp() -> None:
    """Also where numbers are agreed on."""
    started = {}
    for name in ("ddp", "adascale", "agreement"):
        model = make_model()
        wrapped = DistributedDataParallel(model)
        inner = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer: Any = inner if name == "ddp" else AdaScale(inner, wrapped, base_batch_size=SIZE)
        loop = Loop()
        for step in range(3):
            if name == "agreement":
                optimizer.set_agreement([float(dist.get_rank())])
            optimizer.zero_grad()
            before = collectives()
            backward(loss_of(wrapped, loop.batches()[dist.get_rank()]))
            optimizer.step()
            started[name, step] = collectives() - before
    for step in range(3):
        assert started["adascale", step] == started["agreement", step] == started["ddp", step] + 1


def an_agreement_that_comes_and_goes() -> None:
    """At another place of the loop on each rank."""
    loop, rank, world = Loop(), dist.get_rank(), dist.get_world_size()
    for step in range(6):
        if step == 1 and rank == 0:
            loop.ada.set_agreement([1.0, rank])

        def between(_: Loop, step: int = step) -> None:
            if step == 1 and rank:
                loop.ada.set_agreement([1.0, rank])
            if step == 4:
                loop.ada.set_agreement([])

        loop.take_one(between=between)
        assert loop.ada.agreed == ([float(world), float(sum(range(world)))] if 1 <= step < 4 else [])


def two_models_in_one_backward() -> None:
    """Their buckets and statistics share a process group, with a collective of the loop's own in between."""
    loops = [Loop(model=make_model(1)), Loop(model=make_model(2), wrap=ddp(bucket_cap_mb=1e-4))]
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(4):
        gains = [loop.expect([gradient_of(loop.bare, batch) for batch in loop.batches()]) for loop in loops]
        losses = [loss_of(loop.model, loop.batches()[rank]) for loop in loops]
        for loop in loops:
            loop.ada.zero_grad()
        backward(torch.stack(losses).sum())
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == world
        for loop, gain in zip(loops, gains, strict=True):
            loop.ada.step()
            loop.check(gain)


class Recomputed(nn.Module):
    """Its middle layers are computed again in the backward: a backward within the backward, where reentrant."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.layers = make_model()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.layers[1], self.layers[0](x), use_reentrant=self.reentrant)
        out: Tensor = self.layers[2](hidden)
        return out


def recomputed_activations() -> None:
    for reentrant in (False, True):
        for options in ({"static_graph": True}, {"bucket_cap_mb": 1e-4}):
            Loop(model=Recomputed(reentrant=reentrant), wrap=ddp(**options)).take()


def hooks_of_torchs_own() -> None:
    Loop(comm_hook=(None, allreduce_hook)).take()
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=3)
    Loop(comm_hook=(state, powerSGD_hook)).take(2)  # exact until it begins to compress


class Turning(nn.Module):
    """A complex weight, whose gradient counts by its real and imaginary parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 6, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.weight.T).abs()


def complex_parameters() -> None:
    model, rank, world = Turning(), dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(model)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=SIZE)
    oracle, batches = GainOracle(), Loop().batches()
    gradients = []
    for batch in batches:
        twin = copy.deepcopy(model)
        backward(loss_of(twin, batch))
        assert twin.weight.grad is not None
        gradients.append(torch.view_as_real(twin.weight.grad).flatten().numpy())
    oracle.update([SIZE] * world, gradients, float(world))
    backward(loss_of(wrapped, batches[rank]))
    ada.step()
    assert ada.gain == pytest.approx(oracle.gain(float(world)), rel=1e-9)


CORNERS = (
    one_collective_more_than_plain_ddp,
    an_agreement_that_comes_and_goes,
    two_models_in_one_backward,
    recomputed_activations,
    hooks_of_torchs_own,
    complex_parameters,
)
