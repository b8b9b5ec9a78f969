"""Adasum: gradients combined so that orthogonal ones add and parallel ones average, for any number of ranks.

Maleki et al., "Scaling distributed training with adaptive summation", MLSys 2021. Per parameter tensor:

    adasum(a, b) = (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b

and a balanced tree over the ranks, weighted by leaves where their number is no power of two (docs/adasum.md).

    stretto.adasum.all_reduce_(gradients)                             # in place, over torch.distributed
    model.register_comm_hook(None, stretto.adasum.ddp_hook)           # the gradients of a DDP model
    optimizer = stretto.adasum.DeltaOptimizer(torch.optim.AdamW(...)) # what a local optimizer made of them

Never together with AdaScale's scaling of the learning rate: `ElasticTrainer(rule=...)` is the one switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.distributed as dist
from torch import Tensor

from stretto.adasum.ddp import HookState, ddp_hook, local_hook
from stretto.adasum.delta import DeltaOptimizer
from stretto.adasum.reducer import ALGORITHMS, Algorithm, Reducer, checked_algorithm, reducer_of
from stretto.adasum.reference import combine, pair
from stretto.adasum.statistics import Statistics

__all__ = [
    "Algorithm",
    "DeltaOptimizer",
    "HookState",
    "Reducer",
    "Statistics",
    "all_reduce_",
    "combine",
    "ddp_hook",
    "local_hook",
    "pair",
]


def all_reduce_(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None, algorithm: Algorithm = "auto"
) -> Statistics:
    """Overwrite each tensor with the Adasum of all ranks' tensors in its place; bitwise the same on every rank.

    tensors: float32, float64, bfloat16 or float16, dense, of any shapes and strides, each a layer of its own.
    Accumulation is in float64. algorithm: "rvh" (rounds between pairs of ranks), "gram" (three collectives), or "auto":
    "gram", unless there are 8 ranks or more and so many tiny float32 layers that Gram matrices outweigh them.
    Without torch.distributed, or on one rank, nothing changes. Every rank calls it; ValueError on every rank where
    their lists differ or one of them has a sparse tensor. Buffers are kept for the next call, until the group is gone.
    """
    reducer = reducer_of(group)
    problem = ""
    if isinstance(cast(object, tensors), Tensor):
        problem = "tensors is a single tensor; give a list, in which each tensor is a layer: [tensor]"
    if algorithm not in ALGORITHMS:
        try:
            checked_algorithm(algorithm)
        except ValueError as error:
            problem = str(error)
    return reducer.reduce(list(tensors), algorithm, problem)
