"""torch.distributed.checkpoint's StorageReader: what this rank needs, checked while it is read, never unpickled."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future
from xxhash import xxh3_64

from stretto.checkpoint.catalogue import check
from stretto.checkpoint.errors import Damaged, reason_of
from stretto.checkpoint.index import Chunk, Index, TensorForm
from stretto.checkpoint.manifest import FileEntry
from stretto.checkpoint.store import Store

_BLOCK_BYTES = 1 << 20  # read, and checksummed while a core's own cache still has it


class TensorLoader(LoadPlanner):
    """Plans what this rank reads into `state_dict`: names to tensors of the saved shapes, sharded as it wants them."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None, "a reader gives its metadata"
        self._tensors, self._metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        return create_default_local_load_plan(self._tensors, self._metadata)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise Damaged(f"{read_item.dest_index.fqn} is no tensor; nothing else is read from checkpoints")

    def resolve_bytes(self, read_item: ReadItem) -> io.BytesIO:
        raise Damaged(f"{read_item.dest_index.fqn} is no tensor; nothing else is read from checkpoints")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._tensors[read_item.dest_index.fqn]
        local: Tensor = target.to_local() if hasattr(target, "to_local") else target
        for dimension, (offset, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            local = local.narrow(dimension, offset, size)
        return local

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The target's own memory was written."""


class ShardReader(StorageReader):
    """Reads from one checkpoint, whose indices are known already.

    `checks`: files whose bytes this rank compares with the manifest; Damaged is raised where one differs. The ranks
    share them: read them all before any of it is used.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        indices: Sequence[Index],
        files: Mapping[str, FileEntry],
        *,
        checks: frozenset[str],
        threads: int = 2,
    ) -> None:
        self._store = store
        self._folder = folder
        self._files = files
        self._checks = checks
        self._threads = threads
        self._chunks = {(chunk.tensor, chunk.offsets): chunk for index in indices for chunk in index.chunks}
        self._forms = {name: form for index in indices for name, form in index.tensors.items()}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """There is nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        boxes = defaultdict(list)
        for chunk in self._chunks.values():
            boxes[chunk.tensor].append(ChunkStorageMetadata(Size(chunk.offsets), Size(chunk.sizes)))
        return Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(dtype=form.torch_dtype), Size(form.shape), boxes[name])
                for name, form in self._forms.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """There is nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors. Raises Damaged; what was filled by then is not to be used."""
        wanted: dict[str, dict[Chunk, list[ReadItem]]] = {file: {} for file in self._checks}
        for item in plan.items:
            assert item.storage_index.offset is not None, "every part of a tensor has a place"
            chunk = self._chunks[item.storage_index.fqn, tuple(item.storage_index.offset)]
            wanted.setdefault(chunk.file, {}).setdefault(chunk, []).append(item)
        with ThreadPoolExecutor(self._threads, "stretto-read") as pool:
            for _ in pool.map(lambda each: self._read_file(each[0], each[1], planner), wanted.items()):
                pass
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "/" not in os.fspath(checkpoint_id)

    def _read_file(self, file: str, wanted: dict[Chunk, list[ReadItem]], planner: LoadPlanner) -> None:
        try:
            with self._store.open(f"{self._folder}/{file}") as source:
                stream = _Stream(source, file, checked=file in self._checks)
                for chunk in sorted(wanted, key=lambda chunk: chunk.start):
                    stream.skip_to(chunk.start)
                    self._fill(stream, chunk, wanted[chunk], planner)
                if file in self._checks:
                    stream.skip_to(None)
                    check(file, self._files[file], FileEntry(stream.position, stream.digest.hexdigest()))
        except FileNotFoundError as error:
            raise Damaged(f"{file} is missing") from error
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {reason_of(error, self._store.url)}") from error

    def _fill(self, stream: _Stream, chunk: Chunk, items: list[ReadItem], planner: LoadPlanner) -> None:
        form = self._forms[chunk.tensor]
        targets = [planner.resolve_tensor(item).detach() for item in items]
        if len(items) == 1 and tuple(items[0].lengths) == chunk.sizes and _writable(targets[0], form):
            stream.read_into(_bytes_of(targets[0]))
            return
        values = torch.empty(chunk.sizes, dtype=form.torch_dtype)
        stream.read_into(_bytes_of(values))
        for item, target in zip(items, targets, strict=True):
            part = values
            for dimension, (offset, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dimension, offset, size)
            target.copy_(part)


class _Stream:
    """A file from its beginning on, with the checksum of all that has passed if that is wanted."""

    def __init__(self, source: BinaryIO, file: str, *, checked: bool) -> None:
        self.position = 0
        self.digest = xxh3_64()
        self._source = source
        self._file = file
        self._checked = checked

    def read_into(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            count = self._next(target[filled : filled + _BLOCK_BYTES])
            if not count:
                raise Damaged(f"{self._file} ends after {self.position} bytes")
            filled += count

    def skip_to(self, position: int | None) -> None:
        """Pass over what nobody wants; None: to the end."""
        if not self._checked and position is not None:
            self._source.seek(position)
            self.position = position
            return
        scratch = memoryview(bytearray(_BLOCK_BYTES))
        while position is None or self.position < position:
            room = _BLOCK_BYTES if position is None else min(position - self.position, _BLOCK_BYTES)
            if not self._next(scratch[:room]):
                break

    def _next(self, target: memoryview) -> int:
        count: int = self._source.readinto(target)  # type: ignore[attr-defined]  # every binary file has it
        self.position += count
        if self._checked:
            self.digest.update(target[:count])
        return count


def _writable(target: Tensor, form: TensorForm) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and target.dtype == form.torch_dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
