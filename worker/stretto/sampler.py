"""One global order of the samples per epoch, cut into batches of any size for any number of ranks."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1

_WORD = 2**32


class ElasticSampler:
    """Gives every sample exactly once per epoch over any sequence of batch sizes and world sizes.

    The order of an epoch is a permutation that depends on (seed, epoch) alone. It comes from NumPy's
    `RandomState`, whose streams NumPy has frozen, so it is the same in every release and on every machine.
    The permutation of the latest epoch is kept: 4 bytes per sample (8 beyond 2**32 samples), about 10 s once
    per epoch for 1e8 samples.

    The cursor (`epoch`, `consumed`) moves only through `advance`, so the owner decides when samples count
    as used.
    """

    def __init__(self, length: int, *, seed: int, shuffle: bool = True) -> None:
        self._length = _whole("length", length, minimum=1)
        self._seed = _whole("seed", seed)
        if self._seed >= _WORD**2:
            raise ValueError(f"seed is {seed}; allowed: 0 to 2**64 - 1")
        self._shuffle = bool(shuffle)
        self._epoch = 0
        self._consumed = 0
        self._order: tuple[int, NDArray[Any]] | None = None

    def __len__(self) -> int:
        """Samples per epoch."""
        return self._length

    @property
    def epoch(self) -> int:
        """The epoch that the cursor is in, from 0."""
        return self._epoch

    @property
    def consumed(self) -> int:
        """Samples of this epoch that were used; below the length."""
        return self._consumed

    def global_batch(self, epoch: int, consumed: int, size: int) -> list[int]:
        """Return the next `size` indices of the epoch after `consumed` of them; fewer at its end."""
        _whole("epoch", epoch)
        _whole("size", size, minimum=1)
        if _whole("consumed", consumed) > self._length:
            raise ValueError(f"consumed is {consumed}; an epoch has {self._length} samples")
        stop = min(consumed + size, self._length)
        if not self._shuffle:
            return list(range(consumed, stop))
        indices: list[int] = self._permutation(epoch)[consumed:stop].tolist()
        return indices

    def next_batch(self, size: int) -> list[int]:
        """Return the global batch at the cursor; the cursor stays until `advance`."""
        return self.global_batch(self._epoch, self._consumed, size)

    def for_rank(self, indices: Sequence[int], rank: int, world_size: int) -> list[int]:
        """Return this rank's contiguous share of a global batch.

        Shares differ by at most one sample, the larger ones first; a rank beyond a short batch gets nothing.
        """
        _whole("world_size", world_size, minimum=1)
        if _whole("rank", rank) >= world_size:
            raise ValueError(f"rank is {rank}; allowed in a world of {world_size}: 0 to {world_size - 1}")
        share, rest = divmod(len(indices), world_size)
        start = rank * share + min(rank, rest)
        return list(indices[start : start + share + (rank < rest)])

    def advance(self, n: int) -> None:
        """Count the next `n` samples as used; the last one of an epoch opens the next epoch."""
        left = self._length - self._consumed
        if _whole("n", n) > left:
            raise ValueError(
                f"n is {n}, but epoch {self._epoch} has {left} samples left; advance by one batch at a time"
            )
        self._consumed += n
        if self._consumed == self._length:
            self._epoch, self._consumed = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor and what defines the order, as plain numbers."""
        return {
            "format_version": FORMAT_VERSION,
            "epoch": self._epoch,
            "consumed": self._consumed,
            "length": self._length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Continue at a saved cursor in the saved order; seed and shuffle are taken over, not the length."""
        version = d.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"the sampler's state has format version {version!r}; this release reads {FORMAT_VERSION}: "
                "load it with the release that wrote it"
            )
        if d["length"] != self._length:
            raise ValueError(
                f"the sampler's state is of a dataset with {d['length']} samples, this one has "
                f"{self._length}: resume with the same dataset, or start without the sampler's state"
            )
        epoch, consumed, seed = (_whole(name, d[name]) for name in ("epoch", "consumed", "seed"))
        if consumed >= self._length:
            raise ValueError(f"the sampler's state says consumed={consumed} of {self._length}; allowed: fewer")
        self._epoch, self._consumed = epoch, consumed
        self._seed, self._shuffle = seed, bool(d["shuffle"])
        self._order = None

    def _permutation(self, epoch: int) -> NDArray[Any]:
        if self._order is None or self._order[0] != epoch:
            # The words are hashed by RandomState's own, frozen seeding, so neighbouring epochs are unrelated.
            words = [self._seed % _WORD, self._seed // _WORD, epoch % _WORD, epoch // _WORD]
            order = np.arange(self._length, dtype=np.uint32 if self._length < _WORD else np.uint64)
            np.random.RandomState(words).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _whole(name: str, value: int, *, minimum: int = 0) -> int:
    try:
        number = operator.index(value)  # NumPy's integers too
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {minimum}")
    return number
