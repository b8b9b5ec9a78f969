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

# Of messages that only this module sends and receives.
_TAG = 0x5172
# What a rank sends of a table to all others together; larger ones are all-reduced.
_DIRECT_BYTES = 1 << 18


class Sums(Protocol):
    """Small tables of numbers, over the ranks."""

    world_size: int

    def sum_(self, numbers: Numbers) -> None:
        """Add up over the ranks, in place; every rank gets the same bits."""

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        """Begin to find the largest over the ranks; in place, once what is returned was called."""


class Transport(Sums, Protocol):
    """Between the ranks of one group. Tensors are contiguous; all ranks call the same operations in the same order."""

    rank: int
    # Whether ranks can send to each other one by one, as `PeerTransport` does.
    peers: bool

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
    Between CPUs over gloo ranks send to each other directly: its collectives hand each call to a thread of their own,
    which takes longer than a small vector's way there (0.30 ms instead of 0.15 for 24 bytes, 2 ranks).
    """

    peers = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        backend = dist.get_backend(group)
        self._direct = backend == "gloo"
        # NCCL takes no tensors of the CPU.
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        # Not all begin with the same one.
        self._others = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]

    def sum_(self, numbers: Numbers) -> None:
        self._start(numbers, dist.ReduceOp.SUM)()

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        return self._start(numbers, dist.ReduceOp.MAX)

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        if not self._is_direct(flat):
            theirs, ours = split_sizes(bounds, self.rank, flat.element_size())
            self._group.alltoall_base(as_bytes(received), as_bytes(flat), theirs, ours).wait()
            return
        parts = received.view(self.world_size, -1)
        wait = self._begin(
            [(rank, flat[bounds[rank] : bounds[rank + 1]]) for rank in self._others],
            [(rank, parts[rank]) for rank in self._others],
        )
        parts[self.rank].copy_(flat[bounds[self.rank] : bounds[self.rank + 1]])
        wait()

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None:
        if not self._is_direct(flat):
            # As broadcasts: all_gather of torch 2.13's gloo takes 4 times as long.
            works = [self._group.broadcast(as_bytes(flat[start:stop]), rank) for rank, start, stop in ranges(bounds)]
            for work in works:
                work.wait()
            return
        own = flat[bounds[self.rank] : bounds[self.rank + 1]]
        self._begin(
            [(rank, own) for rank in self._others],
            [(rank, flat[bounds[rank] : bounds[rank + 1]]) for rank in self._others],
        )()

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        if all(self._is_direct(tensor) for _, tensor in (*sends, *receives)):
            self._begin(sends, receives)()
            return
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

    def _is_direct(self, tensor: Tensor) -> bool:
        return self._direct and tensor.device.type == "cpu"

    def _begin(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Callable[[], None]:
        """Messages between CPUs over gloo; empty ones are left out on both sides."""
        works = [self._group.recv([tensor], rank, _TAG) for rank, tensor in receives if tensor.numel()]
        works += [self._group.send([tensor], rank, _TAG) for rank, tensor in sends if tensor.numel()]

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def _start(self, numbers: Numbers, operation: dist.ReduceOp.RedOpType) -> Callable[[], None]:
        if self._direct and numbers.nbytes * (self.world_size - 1) <= _DIRECT_BYTES:
            return self._start_direct(numbers, np.add if operation == dist.ReduceOp.SUM else np.maximum)
        tensor = torch.from_numpy(numbers)
        reduced = tensor.to(self._device)
        work = self._group.allreduce(reduced, operation)

        def finish() -> None:
            work.wait()
            if reduced is not tensor:
                tensor.copy_(reduced)

        return finish

    def _start_direct(self, numbers: Numbers, operation: np.ufunc) -> Callable[[], None]:
        """Every rank gets all ranks' numbers and adds them up in the order of ranks, which gives the same bits."""
        everybodys = np.empty((self.world_size, *numbers.shape), dtype=numbers.dtype)
        everybodys[self.rank] = numbers
        table = torch.from_numpy(everybodys)
        own = table[self.rank]
        wait = self._begin([(rank, own) for rank in self._others], [(rank, table[rank]) for rank in self._others])

        def finish() -> None:
            wait()
            with np.errstate(all="ignore"):
                operation.reduce(everybodys, axis=0, out=numbers)

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
