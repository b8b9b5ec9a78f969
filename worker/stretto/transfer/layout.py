"""Which bytes of which tensor travel in which message: arithmetic that every rank repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Smaller tensors share messages, which costs a copy on both sides; larger ones travel from and to their own memory.
PACK_BELOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a tensor."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class Message:
    """Pieces of tensors, one after the other; all tensors of a message are on the same device."""

    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


def layout(
    tensors: Sequence[tuple[int, bool]], *, chunk_bytes: int, pack_below_bytes: int = PACK_BELOW_BYTES
) -> list[Message]:
    """Return messages of at most `chunk_bytes` that cover every byte of every tensor once.

    tensors: of each the size in bytes, and whether it is on an accelerator.
    """
    messages: list[Message] = []
    for on_accelerator in (False, True):
        packed = _Packer(chunk_bytes)
        for index, (size, place) in enumerate(tensors):
            if place is not on_accelerator:
                continue
            if size < max(pack_below_bytes, 1):
                packed.add(index, size)
            else:
                starts = range(0, size, chunk_bytes)
                messages += [Message((Piece(index, start, min(start + chunk_bytes, size)),)) for start in starts]
        messages += packed.messages()
    return messages


class _Packer:
    """Fills one message after the other to the last byte."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._full: list[Message] = []
        self._pieces: list[Piece] = []
        self._room = chunk_bytes

    def add(self, tensor: int, size: int) -> None:
        start = 0
        while start < size:
            stop = min(size, start + self._room)
            self._pieces.append(Piece(tensor, start, stop))
            self._room -= stop - start
            start = stop
            if not self._room:
                self._close()

    def messages(self) -> list[Message]:
        if self._pieces:
            self._close()
        return self._full

    def _close(self) -> None:
        self._full.append(Message(tuple(self._pieces)))
        self._pieces, self._room = [], self._chunk_bytes
