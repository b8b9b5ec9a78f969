"""A checksum of tensors' bytes at several GB/s, on the device where they are."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGEST_BYTES = 16

_ROW_WORDS = 16_384  # one sum over so many: the weights fill a quarter of a small second-level cache
_BLOCK_WORDS = 131_072  # 1 MiB: read twice, the second time from a cache


class Checksum:
    """Of a sequence of byte strings; any change of a bit, of the order or of a length changes it.

    Each row of 64-bit words is reduced to two sums modulo 2^64: of the words, and of their upper halves, times fixed
    random weights. The second is there because a sum of products hardly sees changes in the top bits alone, such as
    flipped signs. Two rows that differ have equal sums with a probability of 2^-32 at the very worst, for differences
    in one half's top bit; for ordinary ones 2^-63. A cryptographic hash of all sums in order is the checksum; it is
    no defence against somebody who forges rows.
    """

    def __init__(self) -> None:
        self._heads = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._sums: list[Tensor] = []
        self._scratch = np.empty(0, np.int64)

    def add_text(self, data: bytes) -> None:
        self._heads.update(b"t%d:" % len(data))
        self._heads.update(data)

    def add(self, data: Tensor) -> None:
        """Take in a 1-D tensor of uint8, contiguous; does not wait for an accelerator."""
        self._heads.update(b"b%d:" % data.numel())
        whole = data.numel() // 8 * 8
        if whole:
            words = data[:whole]
            self._sums.append(self._on_cpu(words) if data.device.type == "cpu" else _on_accelerator(words))
        if whole < data.numel():
            self._sums.append(data[whole:].to(torch.int64))

    def digest(self) -> bytes:
        """The checksum of everything added so far, `DIGEST_BYTES` long."""
        total = self._heads.copy()
        for each in self._sums:
            total.update(each.cpu().numpy().tobytes())
        return total.digest()

    def _on_cpu(self, data: Tensor) -> Tensor:
        """In NumPy, which starts no threads: torch's crawl where other processes use the cores too."""
        words = data.numpy().view(np.int64)
        if not self._scratch.size:
            self._scratch = np.empty(_BLOCK_WORDS, np.int64)
        weights = _weights()
        sums: tuple[list[NDArray[np.int64]], ...] = ([], [])
        for start in range(0, words.size, _BLOCK_WORDS):
            block = words[start : start + _BLOCK_WORDS]
            upper = np.right_shift(block, 32, out=self._scratch[: block.size])
            whole = block.size // _ROW_WORDS * _ROW_WORDS
            for part, factors, found in zip((block, upper), weights, sums, strict=True):
                found.append(part[:whole].reshape(-1, _ROW_WORDS) @ factors)
                if whole < block.size:
                    found.append(part[None, whole:] @ factors[: block.size - whole])
        return torch.from_numpy(np.hstack([each for found in sums for each in found]))


def _on_accelerator(data: Tensor) -> Tensor:
    """The same, where integer matrices have no product."""
    words = (data if data.data_ptr() % 8 == data.storage_offset() % 8 == 0 else data.clone()).view(torch.int64)
    whole = words.numel() // _ROW_WORDS * _ROW_WORDS
    sums = []
    for part, weights in zip((words, words >> 32), _weights(), strict=True):
        factors = torch.from_numpy(weights).to(words.device)
        sums.append((part[:whole].view(-1, _ROW_WORDS) * factors).sum(1))
        if whole < part.numel():
            sums.append((part[None, whole:] * factors[: part.numel() - whole]).sum(1))
    return torch.cat(sums)


@functools.cache
def _weights() -> NDArray[np.int64]:
    """Two rows of random words, the same in every process and release."""
    words = bytearray(hashlib.shake_128(b"stretto checksum").digest(2 * 8 * _ROW_WORDS))  # torch wants it writable
    return np.frombuffer(words, np.int64).reshape(2, _ROW_WORDS)
