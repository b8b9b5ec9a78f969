"""How a rank's share lies in files: safetensors, which any tool can open."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import WriteItem

from stretto.checkpoint.index import DTYPES, Chunk, part_name

_FILE_ALIGNED = 4096  # where a file begins in the staging buffer, so that it can be written from there past any cache
_DATA_ALIGNED = 64  # where its tensors begin in it


@dataclass(frozen=True)
class Part:
    """One file: its header, then the items' bytes without gaps. begin: of all that in the rank's staging buffer."""

    file: str
    header: bytes
    items: tuple[WriteItem, ...]
    starts: tuple[int, ...]
    data_bytes: int
    begin: int

    @property
    def end(self) -> int:
        """Where the file ends in the staging buffer."""
        return self.begin + len(self.header) + self.data_bytes

    def chunks(self) -> Iterator[Chunk]:
        """Where each item lies in the file."""
        for item, start in zip(self.items, self.starts, strict=True):
            offsets, sizes = box_of(item)
            yield Chunk(item.index.fqn, offsets, sizes, self.file, len(self.header) + start)


def lay_out(items: Sequence[WriteItem], rank: int, *, part_bytes: int) -> list[Part]:
    """Pack the items into files of about this size, in order; larger elements come first in a file, as they align."""
    parts: list[Part] = []
    group: list[WriteItem] = []
    for item in items:
        if group and sum(map(size_of, group)) + size_of(item) > part_bytes:
            parts.append(_part(group, rank, parts))
            group = []
        group.append(item)
    if group:
        parts.append(_part(group, rank, parts))
    return parts


def size_of(item: WriteItem) -> int:
    """An item's bytes."""
    return math.prod(box_of(item)[1]) * dtype_of(item).itemsize


def box_of(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which part of its tensor an item is: offsets and sizes."""
    assert item.tensor_data is not None, "only tensors are written"
    return tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)


def dtype_of(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None, "only tensors are written"
    return item.tensor_data.properties.dtype


def _part(items: Sequence[WriteItem], rank: int, before: Sequence[Part]) -> Part:
    ordered = tuple(sorted(items, key=lambda item: -dtype_of(item).itemsize))
    starts, header, end = [], {}, 0
    for item in ordered:
        offsets, sizes = box_of(item)
        starts.append(end)
        end += size_of(item)
        # A tensor's parts are told apart by where they begin in it.
        header[f"{item.index.fqn}@{','.join(map(str, offsets))}"] = {
            "dtype": DTYPES[dtype_of(item)],
            "shape": list(sizes),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNED)
    begin = -(-before[-1].end // _FILE_ALIGNED) * _FILE_ALIGNED if before else 0
    file = part_name(rank, len(before))
    return Part(file, len(text).to_bytes(8, "little") + text, ordered, tuple(starts), end, begin)
