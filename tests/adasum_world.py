"""Ranks of Adasum as threads of one process, which count what they send; and as processes over gloo."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from stretto.adasum.transport import Numbers, ranges
from torch import Tensor

T = TypeVar("T")
LIMIT_S = 60.0


class ThreadTransport:
    """One rank's. `sent`: elements of the flat vector's dtype that it sent to others, tables of numbers left out."""

    def __init__(self, rank: int, mailboxes: list[list[queue.Queue[Any]]], *, peers: bool = True) -> None:
        self.rank = rank
        self.world_size = len(mailboxes)
        self.peers = peers
        self.sent = 0
        self._mailboxes = mailboxes

    def sum_(self, numbers: Numbers) -> None:
        numbers[...] = np.sum(self._everybodys(numbers), axis=0)

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        numbers[...] = np.max(self._everybodys(numbers), axis=0)
        return lambda: None

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        parts = [flat[bounds[rank] : bounds[rank + 1]] for rank in range(self.world_size)]
        got = self._all_to_all(parts)
        received.copy_(torch.cat(got))

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None:
        own = flat[bounds[self.rank] : bounds[self.rank + 1]]
        got = self._all_to_all([own] * self.world_size)
        for rank, start, stop in ranges(bounds):
            flat[start:stop].copy_(got[rank])

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        for rank, tensor in sends:
            # The tables of dot products are float64, in tests whose vectors are float32.
            self.sent += tensor.numel() if tensor.dtype != torch.float64 else 0
            self._send(rank, tensor.clone())
        for rank, tensor in receives:
            tensor.copy_(self._receive(rank))

    def _everybodys(self, numbers: Numbers) -> list[Numbers]:
        for rank in range(self.world_size):
            self._send(rank, numbers.copy())
        return [self._receive(rank) for rank in range(self.world_size)]

    def _all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        for rank, part in enumerate(parts):
            self.sent += part.numel() if rank != self.rank else 0
            self._send(rank, part.clone())
        return [self._receive(rank) for rank in range(self.world_size)]

    def _send(self, rank: int, value: Any) -> None:
        self._mailboxes[rank][self.rank].put(value)

    def _receive(self, rank: int) -> Any:
        return self._mailboxes[self.rank][rank].get(timeout=LIMIT_S)


def in_threads(world_size: int, work: Callable[[ThreadTransport], T], *, peers: bool = True) -> list[T]:
    """What `work` returns on each rank; the first error of any rank is raised."""
    mailboxes: list[list[queue.Queue[Any]]] = [[queue.Queue() for _ in range(world_size)] for _ in range(world_size)]
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadTransport(rank, mailboxes, peers=peers))
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
