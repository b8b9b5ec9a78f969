"""Adasum's exchanges between live workers: each is a future of the group's, which a cut ends at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.adasum.transport import Numbers, as_bytes, ranges, split_sizes

if TYPE_CHECKING:
    from stretto.live.generation import Generation


class LiveTransport:
    """Between the ranks of one generation; hold it no longer."""

    # Messages between two ranks have no futures in torch, so nothing could end them.
    peers = False

    def __init__(self, generation: Generation, device: torch.device) -> None:
        """device: where small tables of numbers travel from."""
        self.rank = generation.rank
        self.world_size = generation.world_size
        self._generation = generation
        self._device = device

    def sum_(self, numbers: Numbers) -> None:
        self._start(numbers, dist.ReduceOp.SUM)()

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        return self._start(numbers, dist.ReduceOp.MAX)

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        theirs, ours = split_sizes(bounds, self.rank, flat.element_size())
        self._generation.wait(self._generation.all_to_all(as_bytes(received), as_bytes(flat), theirs, ours))

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None:
        futures = [self._generation.broadcast(as_bytes(flat[start:stop]), rank) for rank, start, stop in ranges(bounds)]
        for future in futures:
            self._generation.wait(future)

    def _start(self, numbers: Numbers, operation: dist.ReduceOp.RedOpType) -> Callable[[], None]:
        tensor = torch.from_numpy(numbers)
        reduced = tensor.to(self._device)
        future = self._generation.all_reduce(reduced, operation)

        def finish() -> None:
            self._generation.wait(future)
            if reduced is not tensor:
                tensor.copy_(reduced)

        return finish
