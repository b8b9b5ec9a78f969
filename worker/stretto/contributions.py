"""How a step's contributions are seen: by whom a model's gradients are averaged decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stretto.ddp_norms import AllReduce, CommHook, RankContributions
from stretto.fsdp_norms import ShardContributions, is_sharded, sharded_world_size
from stretto.measure import Sources
from stretto.micro_batches import MicroBatchContributions
from stretto.window import StepTotals, Window


class Contributions(Protocol):
    """Collects the statistics of one step at a time, from the backwards of one model."""

    def attach(self) -> None:
        """Hook parameters that came or were unfrozen since the last call."""

    def detach(self) -> None:
        """Remove what was hooked."""

    def discard(self) -> None:
        """Forget this step's statistics."""

    def announce(self, samples: int, total: int | None) -> None:
        """Note the next micro-batch's size."""

    def totals(self, agreement: Sequence[float]) -> StepTotals:
        """Return the statistics since the last step, and what was agreed on, summed over all ranks; one host read."""


def make_contributions(
    module: torch.nn.Module,
    window: Window,
    sources: Sources,
    *,
    comm_hook: CommHook | tuple[Any, CommHook] | None,
    all_reduce: AllReduce | None,
) -> Contributions:
    """Return what watches this model: DDP's buckets, FSDP2's reduce-scatters, or the parameters of a bare module."""
    pair = comm_hook if comm_hook is None or isinstance(comm_hook, tuple) else (None, comm_hook)
    if is_sharded(module):
        if pair is not None:
            raise ValueError("comm_hook is a hook of DDP, and the model is sharded by fully_shard, which has none")
        if not sources.measure.flat:
            raise ValueError(
                "AdaScale measures sharded gradients as they are scattered, all at once: give the optimizer every "
                'parameter of the model that is trained, and another rule than "adamscale"'
            )
        return ShardContributions(module, sources, window)
    if isinstance(module, DistributedDataParallel):
        if window.world_size > 1:
            return RankContributions(module, sources, window, comm_hook=pair, all_reduce=all_reduce)
        if pair is not None:
            module.register_comm_hook(*pair)
    return MicroBatchContributions(sources, window)


def world_size(module: torch.nn.Module, parameters: Sequence[Tensor]) -> int:
    """Return how many ranks share the model's gradients, or say why they cannot."""
    if isinstance(module, DistributedDataParallel):
        return dist.get_world_size(module.process_group)
    if is_sharded(module):
        return sharded_world_size(module, parameters)
    if "FullyShardedDataParallel" in {base.__name__ for part in module.modules() for base in type(part).__mro__}:
        raise ValueError(
            "model is a FullyShardedDataParallel, whose flat shards hide each rank's gradient: use "
            "torch.distributed.fsdp.fully_shard, or DDP"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"model is not wrapped in DDP, but there are {dist.get_world_size()} ranks, whose gradients would never "
            "meet: pass DistributedDataParallel(model), or fully_shard(model)"
        )
    return 1
