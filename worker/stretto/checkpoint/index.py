"""What one rank has written of a checkpoint: which part of which tensor is where, and the state that is no tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stretto.checkpoint.errors import Damaged
from stretto.checkpoint.manifest import FileEntry

# As safetensors calls them; what is not here cannot be stored.
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_INDEX = re.compile(r"rank-(\d{5})\.json")


@dataclass(frozen=True)
class TensorForm:
    """A whole tensor, whatever parts it was written in. dtype: safetensors' name."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _BY_NAME[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, contiguous in a file. start: of its bytes, from the file's beginning."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Index:
    """tree: rank 0's state that is no tensor, None on other ranks. own: what differs by rank."""

    rank: int
    save: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorForm]
    chunks: tuple[Chunk, ...]
    tree: Any
    own: Any

    def encode(self) -> bytes:
        return json.dumps(asdict(self), allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> Index:
        """Read an index; Damaged says what is wrong with it."""
        try:
            body = json.loads(data)
            index = cls(
                rank=body["rank"],
                save=body["save"],
                files={name: FileEntry(**entry) for name, entry in body["files"].items()},
                tensors={name: _form(each) for name, each in body["tensors"].items()},
                chunks=tuple(_chunk(each) for each in body["chunks"]),
                tree=body["tree"],
                own=body["own"],
            )
            for chunk in index.chunks:
                _check_chunk(chunk, index)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        return index


def index_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def part_name(rank: int, part: int) -> str:
    return f"rank-{rank:05d}-part-{part:04d}.safetensors"


def failure_name(rank: int) -> str:
    return f"rank-{rank:05d}.failed"


def ranks_among(names: Mapping[str, int]) -> set[int]:
    """Whose index is there."""
    return {int(match[1]) for name in names if (match := _INDEX.fullmatch(name))}


def check_coverage(indices: list[Index]) -> None:
    """Raise Damaged unless the chunks of all ranks make up every tensor, each element once."""
    covered: dict[str, int] = {}
    forms: dict[str, TensorForm] = {}
    chunks: dict[str, list[Chunk]] = {}
    for index in indices:
        for name, form in index.tensors.items():
            if forms.setdefault(name, form) != form:
                raise Damaged(f"{name} is {forms[name]} on one rank and {form} on rank {index.rank}")
        for chunk in index.chunks:
            covered[chunk.tensor] = covered.get(chunk.tensor, 0) + math.prod(chunk.sizes)
            chunks.setdefault(chunk.tensor, []).append(chunk)
    for name, form in forms.items():
        if covered.get(name, 0) != math.prod(form.shape):
            raise Damaged(
                f"{covered.get(name, 0)} of {math.prod(form.shape)} elements of {name} were written: the ranks hold "
                "different states"
            )
        if _overlap(chunks.get(name, [])):
            raise Damaged(f"parts of {name} overlap")


def _overlap(chunks: list[Chunk]) -> bool:
    """Whether two boxes of one tensor share an element. Swept along the dimension that they are cut in."""
    boxes = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if len(boxes) < 2:
        return False
    dimensions = range(len(boxes[0].sizes))
    cut = max(dimensions, key=lambda dimension: len({box.offsets[dimension] for box in boxes}), default=0)
    open_boxes: list[Chunk] = []
    for box in sorted(boxes, key=lambda box: box.offsets[cut : cut + 1]):
        open_boxes = [each for each in open_boxes if each.offsets[cut] + each.sizes[cut] > box.offsets[cut]]
        for other in open_boxes:
            if all(
                other.offsets[d] < box.offsets[d] + box.sizes[d] and box.offsets[d] < other.offsets[d] + other.sizes[d]
                for d in dimensions
            ):
                return True
        open_boxes.append(box)
    return False


def _form(value: Any) -> TensorForm:
    form = TensorForm(value["dtype"], tuple(value["shape"]))
    if form.dtype not in _BY_NAME or not all(type(size) is int and size >= 0 for size in form.shape):
        raise ValueError(f"{form} is no form of a tensor that this release knows")
    return form


def _chunk(value: Any) -> Chunk:
    return Chunk(value["tensor"], tuple(value["offsets"]), tuple(value["sizes"]), value["file"], value["start"])


def _check_chunk(chunk: Chunk, index: Index) -> None:
    """A crafted index must not reach outside of its tensors and files."""
    form = index.tensors[chunk.tensor]
    inside = len(chunk.offsets) == len(chunk.sizes) == len(form.shape) and all(
        offset >= 0 and size >= 0 and offset + size <= whole
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, form.shape, strict=True)
    )
    end = chunk.start + math.prod(chunk.sizes) * form.torch_dtype.itemsize
    if not inside or chunk.start < 0 or end > index.files[chunk.file].size_bytes:
        raise ValueError(f"a part of {chunk.tensor} lies outside of it or of {chunk.file}")
