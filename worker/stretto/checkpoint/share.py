"""Who writes what: every byte of the state once, the ranks' shares equal, without asking each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


class SharePlanner(SavePlanner):
    """Plans one rank's share of a save: `state_dict` maps names to tensors, the same names on all ranks.

    Plain tensors are the same on all ranks; each rank takes its nth part of their bytes, cut at rows. Of a sharded one
    each rank takes what it holds; where ranks hold the same, they share it. Nothing larger than `item_bytes` is one
    item, rows permitting, so that items pack well into files.
    """

    def __init__(self, rank: int, world_size: int, *, owners: Mapping[str, int], item_bytes: int) -> None:
        """owners: of tensors that are one rank's to write, whole, since the others' may differ."""
        self._rank = rank
        self._world_size = world_size
        self._owners = owners
        self._item_bytes = item_bytes
        self._tensors: Mapping[str, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Tensor], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        replicated = {}
        boxes: list[tuple[str, Box]] = []
        for name, tensor in self._tensors.items():
            if isinstance(tensor, DTensor):
                boxes += [(name, box) for box in _held(name, tensor)]
            elif name not in self._owners:
                replicated[name] = tensor
            elif self._owners[name] == self._rank:
                boxes.append((name, ((0,) * tensor.ndim, tuple(tensor.shape))))
        boxes += _shares(replicated, self._rank, self._world_size)
        return SavePlan(
            [
                _item(name, self._tensors[name], piece)
                for name, box in boxes
                for piece in _pieces(box, self._tensors[name].element_size(), self._item_bytes)
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Nobody else's plan is needed; torch's own planner would compare them all on one rank."""
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The item's values, in the live state; not copied."""
        assert write_item.tensor_data is not None, "only tensors are planned"
        tensor, chunk = self._tensors[write_item.index.fqn], write_item.tensor_data.chunk
        offsets = tuple(chunk.offsets)
        if isinstance(tensor, DTensor):
            (begin, _) = _local_box(tensor)
            tensor, offsets = tensor.to_local(), tuple(o - b for o, b in zip(offsets, begin, strict=True))
        for dimension, (offset, size) in enumerate(zip(offsets, chunk.sizes, strict=True)):
            tensor = tensor.narrow(dimension, offset, size)
        return tensor


def _shares(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> Iterator[tuple[str, Box]]:
    total = sum(tensor.nbytes for tensor in tensors.values())
    begin, end = (total * each // world_size for each in (rank, rank + 1))
    before = 0
    for name, tensor in tensors.items():
        whole: Box = ((0,) * tensor.ndim, tuple(tensor.shape))
        if not tensor.numel():
            if rank == 0:
                yield name, whole
            continue
        share = _cut(whole, tensor.nbytes, begin - before, end - before)
        before += tensor.nbytes
        if share is not None:
            yield name, share


def _held(name: str, tensor: DTensor) -> Iterator[Box]:
    """What this rank is to write of a sharded tensor."""
    coordinate, replicas, replica = tensor.device_mesh.get_coordinate(), 1, 0
    if coordinate is None:
        return
    for dimension, placement in enumerate(tensor.placements):
        if type(placement) is Replicate:
            size = tensor.device_mesh.size(dimension)
            replicas, replica = replicas * size, replica * size + coordinate[dimension]
        elif type(placement) is not Shard:
            raise ValueError(f"{name} is placed as {placement}, which cannot be saved; allowed: Shard and Replicate")
    box, held_bytes = _local_box(tensor), tensor.to_local().nbytes
    if not held_bytes:
        if not tensor.numel() and not any(coordinate):
            yield box
        return
    share = _cut(box, held_bytes, held_bytes * replica // replicas, held_bytes * (replica + 1) // replicas)
    if share is not None:
        yield share


def _local_box(tensor: DTensor) -> Box:
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch's own
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _cut(box: Box, size_bytes: int, begin: int, end: int) -> Box | None:
    """The rows of a box that begin in this range of its bytes. Contiguous in memory, as the box is."""
    offsets, sizes = box
    dimension = _rows_dimension(sizes)
    rows = sizes[dimension] if sizes else 1
    first, last = (min(max(-(-edge * rows // size_bytes), 0), rows) for edge in (begin, end))
    if first >= last:
        return None
    if not sizes:
        return box
    moved = (*offsets[:dimension], offsets[dimension] + first, *offsets[dimension + 1 :])
    return moved, (*sizes[:dimension], last - first, *sizes[dimension + 1 :])


def _pieces(box: Box, element_bytes: int, limit_bytes: int) -> Iterator[Box]:
    size_bytes = math.prod(box[1]) * element_bytes
    count = max(-(-size_bytes // limit_bytes), 1)
    if count == 1:
        yield box
        return
    for number in range(count):
        piece = _cut(box, size_bytes, size_bytes * number // count, size_bytes * (number + 1) // count)
        if piece is not None:
            yield piece


def _rows_dimension(sizes: tuple[int, ...]) -> int:
    """The first dimension that can be cut."""
    return next((dimension for dimension, size in enumerate(sizes) if size > 1), 0)


def _item(name: str, tensor: Tensor, box: Box) -> WriteItem:
    offsets, sizes = box
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(Size(offsets), Size(sizes)),
            properties=TensorProperties(dtype=tensor.dtype),
            size=tensor.size(),
        ),
    )
