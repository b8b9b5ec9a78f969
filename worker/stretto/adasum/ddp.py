"""Adasum of the gradients of a DDP model: a communication hook on its flat buckets (gradient mode)."""

# Annotations stay objects here: DDP compares those of a communication hook with its own types.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed re-exports it without saying so

from stretto.adasum.checks import check_gradient
from stretto.adasum.reducer import Algorithm, Reducer, reducer_of
from stretto.adasum.segments import Segments
from stretto.adasum.statistics import Statistics, joined
from stretto.adasum.transport import TorchTransport
from stretto.adasum.tree import Leaves
from stretto.group import torch_private
from stretto.group.failures import GroupBroken


class HookState:
    """What `ddp_hook` keeps: the way to the other ranks, buffers, and what it has found out in the latest backward.

    `reducer`: by default one of the process group, torch's own where that is None. `leaves`: several ranks in one are
    averaged before they are combined.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        algorithm: Algorithm = "auto",
        leaves: Leaves | None = None,
        reducer: Reducer | None = None,
    ) -> None:
        if reducer is None:
            group = group or dist.group.WORLD
            if group is None:
                raise ValueError("torch.distributed is not initialised: give a group, or call init_process_group first")
            reducer = Reducer(TorchTransport(group), algorithm, leaves)
        self.reducer = reducer
        self._layouts: dict[tuple[int, ...], Segments] = {}
        self._found: dict[int, Statistics] = {}

    @property
    def statistics(self) -> Statistics:
        """Of the latest backward, bucket after bucket."""
        return joined([self._found[index] for index in sorted(self._found)])

    def mean_sqr_norm(self, bucket: int) -> float | None:
        """|mean_i g_i|^2 of this bucket in the latest backward: what AdaScale's statistics need of a plain mean."""
        return self._found[bucket].mean_sqr_norm

    def reduce(self, bucket: GradBucket) -> None:
        """Combine one bucket with the other ranks' in place; parameters are layers."""
        buffer, index = bucket.buffer(), bucket.index()
        if index == 0:
            self._found.clear()
        sizes = _sizes(buffer, bucket.gradients())
        if sizes not in self._layouts:
            self._layouts[sizes] = Segments(sizes)
        self._found[index] = self.reducer.reduce_flat(buffer, self._layouts[sizes])


def ddp_hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Have DDP combine gradients by Adasum: `model.register_comm_hook(state, stretto.adasum.ddp_hook)`.

    state: a HookState; or a process group, None for the default one. All ranks take the same. The bucket is combined
    before this returns: its collectives are then in one order with all others of the group, also those of DDP itself.
    """
    future: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[bucket.buffer().device] if bucket.buffer().is_cuda else None
    )
    try:
        if isinstance(state, HookState):
            state.reduce(bucket)
        else:
            sizes = _sizes(bucket.buffer(), bucket.gradients())
            reducer_of(state).reduce_flat(bucket.buffer(), Segments(sizes))
    except GroupBroken as broken:
        reason, unreachable = broken.reason, broken.unreachable
        torch_private.fail(future, lambda: GroupBroken(reason, unreachable))
        return future
    future.set_result(bucket.buffer())
    return future


def local_hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Leave each rank its own gradients, as delta mode wants them: `model.register_comm_hook(None, local_hook)`."""
    future: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[bucket.buffer().device] if bucket.buffer().is_cuda else None
    )
    future.set_result(bucket.buffer())
    return future


def _sizes(buffer: Tensor, gradients: list[Tensor]) -> tuple[int, ...]:
    """Elements of each parameter, in the buffer's order; asked anew each time, since DDP rebuilds its buckets."""
    check_gradient("the gradient of a parameter", buffer)
    starts = [int(grad.storage_offset()) - int(buffer.storage_offset()) for grad in gradients]
    ends = [*starts[1:], buffer.numel()]
    return tuple(end - start for start, end in zip(starts, ends, strict=True))
