"""What ranks do in the tests of Adasum between processes, and what one process makes of all of it.

Rank r's batches follow from the step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pytorch_optimizer import Lamb
from rank_scenarios import batch_of
from stretto import adasum
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from toy_regression import backward, loss_of, make_model

LR = 0.05
STEPS = 4

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "lamb": lambda parameters: Lamb(parameters, lr=0.01),
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradients_of(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    """The sum over the batches, of one rank, on a copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for batch in batches:
        backward(loss_of(twin, batch) / len(batches))
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]


def work(rank: int) -> dict[str, Any]:
    world_size = torch.distributed.get_world_size()
    results: dict[str, Any] = {
        "collectives": collectives(rank, world_size),
        "ddp": {name: hooked(rank, world_size, **options) for name, options in DDP.items()},
        "unused": hooked_with_unused(rank),
        "clipped": hooked(rank, world_size, clip=0.01),
        "delta": {name: delta(rank, make) for name, make in OPTIMIZERS.items()},
        "delta_ddp": delta(rank, OPTIMIZERS["momentum"], ddp=True),
        "delta_accumulated": delta(rank, OPTIMIZERS["adam"], micro_batches=2),
        "poisoned": delta_poisoned(rank),
        "failing": delta_failing(rank),
        "disagreeing": disagreeing(rank),
        "scaler": hooked_with_scaler(rank),
    }
    results["subgroup"] = subgroup(rank, world_size)
    if world_size == 4:
        results["nodes"] = hooked(rank, world_size, leaves=((0, 1), (2, 3)))
    return results


def collectives(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        rows = [
            [
                torch.randn(size, generator=torch.Generator().manual_seed(97 * r + size)).to(dtype)
                for size in (40, 0, 3000)
            ]
            for r in range(world_size)
        ]
        for algorithm in get_args(adasum.Algorithm):
            mine = [tensor.clone() for tensor in rows[rank]]
            for _ in range(2):  # the second call uses what the first one kept
                for tensor, first in zip(mine, rows[rank], strict=True):
                    tensor.copy_(first)
                adasum.all_reduce_(mine, algorithm=algorithm)
            found[f"{algorithm} {dtype}"] = [mine, adasum.combine(rows)]
    many = [torch.full((1 + layer % 7,), float(rank + 1)) for layer in range(3000)]
    adasum.all_reduce_(many)
    found["many"] = [torch.cat(many), torch.full((sum(map(len, many)),), (world_size + 1) / 2)]
    return found


def subgroup(rank: int, world_size: int) -> Tensor:
    """What the first rank and the last make of it, in a group of their own."""
    group = torch.distributed.new_group([0, world_size - 1])
    mine = torch.full((5,), float(rank))
    if rank in (0, world_size - 1):
        adasum.all_reduce_([mine], group)
    return mine


DDP: dict[str, dict[str, Any]] = {
    "one_bucket": {},
    "small_buckets": {"ddp": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}},
    "static_graph": {"ddp": {"static_graph": True}},
    "state_is_a_group": {"plain_state": True},
    "accumulated": {"micro_batches": 3},
}


def hooked(
    rank: int,
    world_size: int,
    *,
    ddp: dict[str, Any] | None = None,
    plain_state: bool = False,
    micro_batches: int = 1,
    leaves: Any = None,
    clip: float | None = None,
) -> dict[str, Any]:
    """Parameters after some steps of SGD, and what the reference makes of all ranks' gradients."""
    model = make_model()
    twin = make_model()
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    state = None if plain_state else adasum.HookState(leaves=leaves)
    wrapped.register_comm_hook(state, adasum.ddp_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                backward(loss_of(wrapped, batch_of(step, rank, micro, 8)) / micro_batches)
        rows = [
            gradients_of(twin, [batch_of(step, r, micro, 8) for micro in range(micro_batches)])
            for r in range(world_size)
        ]
        wanted = adasum.combine(rows) if leaves is None else _of_nodes(rows, leaves)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            shrink = clip / (float(torch.cat([g.flatten() for g in wanted]).norm()) + 1e-6)  # as torch has it
            wanted = [grad * min(shrink, 1.0) for grad in wanted]
        optimizer.step()
        with torch.no_grad():
            for parameter, grad in zip(twin.parameters(), wanted, strict=True):
                parameter.sub_(grad, alpha=LR)
    layers = len(state.statistics.orthogonality) if state is not None else 4
    return {"found": flat(model), "wanted": flat(twin), "layers": layers}


def _of_nodes(rows: list[list[Tensor]], leaves: Any) -> list[Tensor]:
    """The mean inside each node, Adasum between them."""
    nodes = [[torch.stack(layer).mean(0) for layer in zip(*(rows[r] for r in ranks), strict=True)] for ranks in leaves]
    return adasum.combine(nodes)


class TwoHeads(nn.Module):
    """Rank 1 uses one head only; nobody uses the third; the first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second, self.never = (nn.Linear(6, 6).double() for _ in range(4))
        self.body.requires_grad_(False)
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        body = self.body(x)
        out: Tensor = self.first(body) + (self.second(body) if self.both else 0)
        return out[:, :2]


def hooked_with_unused(rank: int) -> dict[str, Any]:
    model = TwoHeads()
    model.both = rank != 1
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    state = adasum.HookState()
    wrapped.register_comm_hook(state, adasum.ddp_hook)
    before = flat(model.body)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(3):
        optimizer.zero_grad()
        backward(loss_of(wrapped, batch_of(step, rank, 0, 4)))
        optimizer.step()
    return {"found": flat(model), "frozen": torch.equal(before, flat(model.body))}


def hooked_with_scaler(rank: int) -> dict[str, Any]:
    """Rank 0 overflows in step 1: no rank steps, every scaler halves its scale."""
    model = make_model(dtype=torch.float32)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(adasum.HookState(), adasum.ddp_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch_of(step, rank, 0, 4)
        bad = float("inf") if step == 1 and rank == 0 else 1.0
        loss = loss_of(wrapped, (x.float() * bad, y.float()))
        backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    return {"found": flat(model), "scale": scaler.get_scale()}


def delta(rank: int, make: Callable[[Any], Optimizer], *, ddp: bool = False, micro_batches: int = 1) -> dict[str, Any]:
    """Parameters after some steps, and what one process makes of all ranks' moves."""
    world_size = torch.distributed.get_world_size()
    model = make_model()
    trained: nn.Module = model
    if ddp:
        trained = DistributedDataParallel(model)
        trained.register_comm_hook(None, adasum.local_hook)
    optimizer = adasum.DeltaOptimizer(make(model.parameters()))
    twins = [make_model() for _ in range(world_size)]
    inners = [make(twin.parameters()) for twin in twins]
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            backward(loss_of(trained, batch_of(step, rank, micro, 8)) / micro_batches)
        optimizer.step()
        starts = [p.detach().clone() for p in twins[0].parameters()]
        moves = []
        for r, (twin, inner) in enumerate(zip(twins, inners, strict=True)):
            grads = gradients_of(twin, [batch_of(step, r, micro, 8) for micro in range(micro_batches)])
            for parameter, grad in zip(twin.parameters(), grads, strict=True):
                parameter.grad = grad
            inner.step()
            moves.append([p.detach() - start for p, start in zip(twin.parameters(), starts, strict=True)])
        for twin in twins:
            with torch.no_grad():
                for parameter, start, move in zip(twin.parameters(), starts, adasum.combine(moves), strict=True):
                    parameter.copy_(start + move)
    return {"found": flat(model), "wanted": flat(twins[0])}


def delta_poisoned(rank: int) -> dict[str, Any]:
    """One rank's gradient is infinite in one step, with a GradScaler and without: nothing moves, on any rank."""
    model = make_model(dtype=torch.float32)
    optimizer = adasum.DeltaOptimizer(OPTIMIZERS["adam"](model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    same = []
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch_of(step, rank, 0, 4)
        bad = float("inf") if step in (1, 2) and rank == 0 else 1.0
        loss = loss_of(model, (x.float() * bad, y.float()))
        before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
        if step == 2:
            backward(loss)
            optimizer.step()
        else:
            backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
        after = optimizer.state_dict()["state"]
        same.append(torch.equal(before, flat(model)) and all(
            torch.equal(state[p][name], after[p][name]) for p in state for name in state[p]
        ) and len(state) == len(after))  # fmt: skip
    return {"found": flat(model), "same": same, "skipped": optimizer.skipped_steps}


def delta_failing(rank: int) -> dict[str, Any]:
    """The last rank's optimizer raises in its first step and in its third."""

    class Failing(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            type(self).calls += 1
            super().step()
            if rank == 1 and type(self).calls in (1, 3):
                raise RuntimeError("no step here")

    model = make_model()
    optimizer = adasum.DeltaOptimizer(Failing(model.parameters(), lr=LR, momentum=0.9))
    messages, same = [], []
    for step in range(4):
        optimizer.zero_grad()
        backward(loss_of(model, batch_of(step, rank, 0, 4)))
        before, entries = flat(model), len(optimizer.state)
        try:
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
            same.append(torch.equal(before, flat(model)) and len(optimizer.state) == entries)
    return {"found": flat(model), "messages": messages, "same": same}


def disagreeing(rank: int) -> list[str]:
    messages = []
    for tensors in (
        [torch.zeros(3)] * (2 if rank else 3),
        [torch.zeros(3 if rank else 4)],
        [torch.zeros(3, dtype=torch.float32 if rank else torch.float64)],
        [torch.zeros(3).to_sparse() if rank else torch.zeros(3)],
        [None if rank else torch.zeros(3)],
        torch.zeros(3) if rank else [torch.zeros(3)],
    ):
        with pytest.raises(ValueError) as error:
            adasum.all_reduce_(tensors)  # type: ignore[arg-type]  # the point
        messages.append(str(error.value))
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = adasum.DeltaOptimizer(torch.optim.SGD(embedding.parameters(), lr=LR))
    backward(embedding(torch.tensor([1])).sum())
    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
    return messages
