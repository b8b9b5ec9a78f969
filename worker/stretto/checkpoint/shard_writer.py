"""torch.distributed.checkpoint's StorageWriter for one rank's share: safetensors files, then an index in JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from xxhash import xxh3_64

from stretto.checkpoint.catalogue import check
from stretto.checkpoint.index import Index, index_name
from stretto.checkpoint.manifest import FileEntry
from stretto.checkpoint.pace import Pace
from stretto.checkpoint.parts import Part, lay_out, size_of
from stretto.checkpoint.settings import CheckpointSettings
from stretto.checkpoint.staging import Staged
from stretto.checkpoint.store import Store

# Written at once, without the interpreter: small blocks would have this thread and training hand it to and fro. A save
# cannot be given up in the middle of one.
_BLOCK_BYTES = 16 << 20


class ShardWriter(StorageWriter):
    """Writes what the plan says into one folder of a store; `finish` writes this rank's index, after its data.

    `read_back`: read what was written, and raise Damaged where it is something else. `pace`: kept between blocks;
    Abandoned is raised where the save is given up. Nothing is gathered from other ranks: whoever commits reads their
    indices from the store.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        rank: int,
        *,
        settings: CheckpointSettings,
        pace: Pace,
        read_back: bool,
    ) -> None:
        self._store = store
        self._folder = folder
        self._rank = rank
        self._part_bytes = settings.part_bytes
        self._threads = settings.write_threads if pace.leisurely else settings.urgent_threads
        self._pace = pace
        self._read_back = read_back

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
        assert isinstance(planner, Staged), "files are written as they lie in the staging buffer"
        staged, parts = planner, list[Part](plan.storage_data)
        self._store.make(self._folder)
        with ThreadPoolExecutor(self._threads, "stretto-write") as pool:
            entries = list(pool.map(lambda part: self._write(part, staged), parts))
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

    def _write(self, part: Part, staged: Staged) -> FileEntry:
        digest, file = xxh3_64(), staged.file(part)

        def blocks() -> Iterator[memoryview]:
            for start in range(0, len(file), _BLOCK_BYTES):
                with self._pace.kept():
                    block = file[start : start + _BLOCK_BYTES]
                    digest.update(block)
                    yield block

        self._store.write(f"{self._folder}/{part.file}", blocks(), direct=True)
        entry = FileEntry(len(file), digest.hexdigest())
        if self._read_back:
            check(part.file, entry, self._found(f"{self._folder}/{part.file}"))
        return entry

    def _found(self, path: str) -> FileEntry:
        digest, size_bytes, blocks = xxh3_64(), 0, self._store.blocks(path)
        while True:
            with self._pace.kept():
                block = next(blocks, None)
                if block is None:
                    return FileEntry(size_bytes, digest.hexdigest())
                digest.update(block)
                size_bytes += len(block)
