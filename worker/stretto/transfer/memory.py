"""Tensors as flat bytes, and messages between those bytes and the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.transfer.layout import Message, Piece


def flat_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes as they lie in memory, uint8 of shape [n]: a view, or a copy where they have gaps or overlap.

    A copy has the strides of `torch.empty_like(tensor)`.
    """
    ordered = _in_storage_order(tensor)
    if not ordered.is_contiguous():
        ordered = _in_storage_order(torch.empty_like(tensor).copy_(tensor))
    return ordered.reshape(-1).view(torch.uint8)


def _in_storage_order(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


@dataclass
class Parcel:
    """A message in this process. `local`: on the tensors' device; `wire`: where collectives want it, often the same."""

    message: Message
    local: Tensor
    wire: Tensor
    borrowed: list[Tensor]


class Parcels:
    """Wraps messages of these tensors. A message of one piece is that tensor's own memory where its device allows.

    `wire`: the device of the collectives; None if they take each message where it is, or nothing is sent. Buffers are
    used again once a parcel is released.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        chunk_bytes: int,
        wire: torch.device | None = None,
        *,
        flatten: Callable[[Tensor], Tensor] = flat_bytes,
    ) -> None:
        self._tensors = tensors
        self._chunk_bytes = chunk_bytes
        self._wire = wire
        self._flatten = flatten
        self._flat: tuple[int, Tensor] = (-1, torch.empty(0))  # the latest: flattening may have copied it
        self._free: list[Tensor] = []

    def wrap(self, message: Message) -> Parcel:
        """Find memory for a message; what is in it means nothing yet, unless it is a tensor's own."""
        borrowed: list[Tensor] = []
        first = message.pieces[0]
        device = self._tensors[first.tensor].device
        if len(message.pieces) == 1:
            local = self._bytes_of(first)
        else:
            local = self._borrow(message.size_bytes, device, borrowed)
        wire = local
        if self._wire is not None and self._wire.type != device.type:
            wire = self._borrow(message.size_bytes, self._wire, borrowed)
        return Parcel(message, local, wire, borrowed)

    def fill(self, parcel: Parcel) -> None:
        """Put the tensors' bytes into it."""
        if len(parcel.message.pieces) > 1:
            for piece, part in self._parts(parcel):
                _copy(part, self._bytes_of(piece))
        if parcel.wire is not parcel.local:
            parcel.wire.copy_(parcel.local)

    def empty(self, parcel: Parcel) -> None:
        """Put its bytes into the tensors, which have no gaps."""
        if parcel.wire is not parcel.local:
            parcel.local.copy_(parcel.wire)
        if len(parcel.message.pieces) > 1:
            for piece, part in self._parts(parcel):
                _copy(self._bytes_of(piece), part)

    def release(self, parcel: Parcel) -> None:
        """Its buffers may be used for another message."""
        self._free += parcel.borrowed

    def _parts(self, parcel: Parcel) -> list[tuple[Piece, Tensor]]:
        pieces = parcel.message.pieces
        parts = torch.split(parcel.local, [piece.stop - piece.start for piece in pieces])
        return list(zip(pieces, parts, strict=True))

    def _bytes_of(self, piece: Piece) -> Tensor:
        if self._flat[0] != piece.tensor:
            self._flat = (piece.tensor, self._flatten(self._tensors[piece.tensor]))
        return self._flat[1][piece.start : piece.stop]

    def _borrow(self, size: int, device: torch.device, borrowed: list[Tensor]) -> Tensor:
        index = next((i for i, buffer in enumerate(self._free) if buffer.device.type == device.type), None)
        if index is None:
            # Copies between an accelerator and memory that the kernel may move take twice as long.
            pinned = device.type == "cpu" and any(each.device.type == "cuda" for each in self._tensors)
            buffer = torch.empty(self._chunk_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        else:
            buffer = self._free.pop(index)
        borrowed.append(buffer)
        return buffer[:size]


def _copy(target: Tensor, source: Tensor) -> None:
    """Both on one device, contiguous; without torch's threads, which crawl where other processes use the cores too."""
    if target.device.type == "cpu":
        target.numpy()[:] = source.numpy()
    else:
        target.copy_(source)
