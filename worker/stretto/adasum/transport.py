"""How ranks exchange: the few operations that Adasum is made of, each of which returns when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

Numbers = npt.NDArray[np.float64] | npt.NDArray[np.int64]


class Transport(Protocol):
    """Between the ranks of one group. Tensors are contiguous; all ranks call the same operations in the same order."""

    rank: int
    world_size: int
    # Whether ranks can send to each other one by one, as `PeerTransport` does.
    peers: bool

    def sum_(self, numbers: Numbers) -> None:
        """Add up over the ranks, in place; every rank gets the same bits."""

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        """Begin to find the largest over the ranks; in place, once what is returned was called."""

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        """Send range i of `flat` to rank i; the ranks' parts of this rank's range come to `received`, by rank."""

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None:
        """Give this rank's range of `flat` to all others, and get theirs."""


class PeerTransport(Transport, Protocol):
    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Send and receive at the same time, by rank; between two ranks messages come in the order of sending."""


class TorchTransport:
    """Over a process group of torch.distributed, gloo or NCCL.

    Collectives are the group's own methods: torch.distributed's functions add checks that small vectors wait for.
    """

    peers = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        # NCCL takes no tensors of the CPU.
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def sum_(self, numbers: Numbers) -> None:
        self._start(numbers, dist.ReduceOp.SUM)()

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        return self._start(numbers, dist.ReduceOp.MAX)

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        theirs, ours = split_sizes(bounds, self.rank, flat.element_size())
        self._group.alltoall_base(as_bytes(received), as_bytes(flat), theirs, ours).wait()

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None:
        # As broadcasts: all_gather of torch 2.13's gloo takes 4 times as long.
        works = [self._group.broadcast(as_bytes(flat[start:stop]), rank) for rank, start, stop in ranges(bounds)]
        for work in works:
            work.wait()

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        operations = [
            dist.P2POp(dist.irecv, as_bytes(tensor), group=self._group, group_peer=rank)
            for rank, tensor in receives
            if tensor.numel()
        ]
        operations += [
            dist.P2POp(dist.isend, as_bytes(tensor), group=self._group, group_peer=rank)
            for rank, tensor in sends
            if tensor.numel()
        ]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def _start(self, numbers: Numbers, operation: dist.ReduceOp.RedOpType) -> Callable[[], None]:
        tensor = torch.from_numpy(numbers)
        reduced = tensor.to(self._device)
        work = self._group.allreduce(reduced, operation)

        def finish() -> None:
            work.wait()
            if reduced is not tensor:
                tensor.copy_(reduced)

        return finish


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory; bytes travel alike in every dtype."""
    return tensor.view(torch.uint8)


def split_sizes(bounds: Sequence[int], rank: int, element_bytes: int) -> tuple[list[int], list[int]]:
    """Bytes that come from each rank, and that go to each rank, when ranges of a vector are scattered."""
    sizes = [(stop - start) * element_bytes for _, start, stop in ranges(bounds, empty=True)]
    return [sizes[rank]] * len(sizes), sizes


def ranges(bounds: Sequence[int], *, empty: bool = False) -> list[tuple[int, int, int]]:
    """(rank, start, stop) of each range, those without elements only if `empty`."""
    found = [(rank, bounds[rank], bounds[rank + 1]) for rank in range(len(bounds) - 1)]
    return found if empty else [each for each in found if each[2] > each[1]]
