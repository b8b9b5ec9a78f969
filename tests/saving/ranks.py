"""Ranks that save and load together: threads of this process, which agree as a process group does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from stretto.checkpoint import Checkpointer, CheckpointSettings

T = TypeVar("T")
_LIMIT_S = 60.0


class ThreadPeers:
    """One rank; the barrier and the sums are shared."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, given: list[Sequence[int]]) -> None:
        self.rank = rank
        self.world_size = world_size
        self._barrier = barrier
        self._given = given

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        self._given[self.rank] = numbers
        self._barrier.wait(_LIMIT_S)
        sums = [sum(each) for each in zip(*self._given, strict=True)]
        self._barrier.wait(_LIMIT_S)
        return sums


def on_ranks(
    world_size: int, folder: Path, work: Callable[[int, Checkpointer], T], settings: CheckpointSettings | None = None
) -> list[T]:
    """What work(rank, checkpointer) returns on each of so many ranks; their checkpointers share the folder."""
    barrier = threading.Barrier(world_size)
    given: list[Sequence[int]] = [()] * world_size
    with ThreadPoolExecutor(world_size) as pool:
        futures = [
            pool.submit(
                work, rank, Checkpointer(folder, peers=ThreadPeers(rank, world_size, barrier, given), settings=settings)
            )
            for rank in range(world_size)
        ]
        return [future.result(_LIMIT_S) for future in futures]
