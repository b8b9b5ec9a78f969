"""torch.distributed.checkpoint's StorageWriter for one rank's share: safetensors files, then an index in JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from xxhash import xxh3_64

from stretto.checkpoint.errors import Abandoned
from stretto.checkpoint.index import Index, index_name
from stretto.checkpoint.manifest import FileEntry
from stretto.checkpoint.parts import Part, lay_out, size_of
from stretto.checkpoint.store import Store

_BLOCK_BYTES = 4 << 20  # written at once: nobody can be given up in the middle of one


class ShardWriter(StorageWriter):
    """Writes what the plan says into one folder of a store; `finish` writes this rank's index, after its data.

    `cancelled()`: asked between blocks; Abandoned is raised where it says so. Nothing is gathered from other ranks:
    whoever commits reads their indices from the store.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        rank: int,
        *,
        part_bytes: int,
        threads: int = 1,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._folder = folder
        self._rank = rank
        self._part_bytes = part_bytes
        self._threads = threads
        self._cancelled = cancelled

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Write into another folder from here on."""
        if checkpoint_id is not None:
            self._folder = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is made by the first who writes there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Decide which files there will be."""
        return SavePlan(plan.items, storage_data=lay_out(plan.items, self._rank, part_bytes=self._part_bytes))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all files and wait until the disk has them. Each result's storage_data is (part, FileEntry)."""
        parts: Sequence[Part] = plan.storage_data
        self._store.make(self._folder)
        with ThreadPoolExecutor(self._threads, "stretto-write") as pool:
            entries = list(pool.map(lambda part: self._write(part, planner), parts))
        results = [
            WriteResult(item.index, size_of(item), (part, entry))
            for part, entry in zip(parts, entries, strict=True)
            for item in part.items
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of what was written. `metadata.planner_data`: what else belongs into it, as an `Index`."""
        index: Index = metadata.planner_data
        written = {
            id(part): (part, entry) for result in results for part, entry in [each.storage_data for each in result]
        }
        complete = Index(
            rank=self._rank,
            save=index.save,
            files={part.file: entry for part, entry in written.values()},
            tensors=index.tensors,
            chunks=tuple(chunk for part, _ in written.values() for chunk in part.chunks()),
            tree=index.tree,
            own=index.own,
        )
        self._store.write(f"{self._folder}/{index_name(self._rank)}", [complete.encode()])
        self._store.sync(self._folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "/" not in os.fspath(checkpoint_id)

    def _write(self, part: Part, planner: SavePlanner) -> FileEntry:
        digest, size_bytes = xxh3_64(), 0

        def blocks() -> Iterator[memoryview]:
            nonlocal size_bytes
            for piece in (memoryview(part.header), *_pieces(part, planner)):
                for start in range(0, len(piece), _BLOCK_BYTES):
                    if self._cancelled():
                        raise Abandoned
                    block = piece[start : start + _BLOCK_BYTES]
                    digest.update(block)
                    size_bytes += len(block)
                    yield block

        self._store.write(f"{self._folder}/{part.file}", blocks())
        return FileEntry(size_bytes, digest.hexdigest())


def _pieces(part: Part, planner: SavePlanner) -> Iterator[memoryview]:
    for item in part.items:
        data = planner.resolve_data(item)
        assert isinstance(data, torch.Tensor), "only tensors are planned"
        yield (data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
