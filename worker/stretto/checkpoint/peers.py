"""The ranks that save and load together, as far as that needs them to agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist


class Peers(Protocol):
    """Called on the training thread only: what runs in the background asks nobody."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all ranks of what each gives; all ranks call it, with equally many."""
        ...


class Alone:
    """One process that saves and loads for itself."""

    rank = 0
    world_size = 1

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers)


class GroupPeers:
    """The ranks of torch's default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        cuda = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        values = torch.tensor(list(numbers), dtype=torch.int64, device=self._device)
        dist.all_reduce(values)
        return [int(value) for value in values.tolist()]


def present_peers() -> Peers:
    """The default group's ranks, or this process alone where there is no group."""
    return GroupPeers() if dist.is_available() and dist.is_initialized() else Alone()
