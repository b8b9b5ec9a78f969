"""Layers in one flat vector, and how a part of it is worked through: arithmetic that every rank repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stretto.adasum.tree import Indices


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of a part; they belong to its layers `first` to `last` (exclusive).

    `starts`: where in the block each of these layers begins. `sizes`: its elements in the block.
    """

    start: int
    stop: int
    first: int
    last: int
    starts: Indices
    sizes: Indices


@dataclass(frozen=True)
class Part:
    """A range of the flat vector: which layers have elements there, and where each begins.

    `layers`: their numbers. `bounds`: of layer i in this range, elements bounds[i] to bounds[i + 1].
    """

    layers: Indices
    bounds: Indices
    # By limit; every step asks for the same.
    _blocks: dict[int, list[Block]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        return int(self.bounds[-1])

    def blocks(self, limit: int) -> list[Block]:
        """Cover the part by blocks of at most `limit` elements: pieces of one layer, or of several short ones."""
        if limit not in self._blocks:
            self._blocks[limit] = self._divided(limit)
        return self._blocks[limit]

    def _divided(self, limit: int) -> list[Block]:
        found = []
        position, layer, size = 0, 0, self.size
        while position < size:
            end = int(self.bounds[layer + 1])
            if end - position >= limit // 2:
                stop = min(end, position + limit)
                found.append(self._block(position, stop, layer, layer + 1))
                layer += stop == end
            else:
                last = int(np.searchsorted(self.bounds, position + limit, side="right")) - 1
                stop = int(self.bounds[last])
                found.append(self._block(position, stop, layer, last))
                layer = last
            position = stop
        return found

    def _block(self, start: int, stop: int, first: int, last: int) -> Block:
        bounds = np.clip(self.bounds[first : last + 1] - start, 0, stop - start)
        return Block(start, stop, first, last, bounds[:-1], np.diff(bounds))


class Segments:
    """Layers that lie one after the other in a flat vector."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """sizes: elements of each layer, in order; 0 is allowed."""
        self.sizes = np.array(sizes, dtype=np.int64)
        self.bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.sizes)])
        self.total = int(self.bounds[-1])
        self.longest = int(self.sizes.max(initial=0))
        self._parts: dict[tuple[int, int], Part] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def part(self, start: int, stop: int) -> Part:
        """What lies between two positions; kept, since every step asks for the same."""
        if (start, stop) not in self._parts:
            lower, upper = np.maximum(self.bounds[:-1], start), np.minimum(self.bounds[1:], stop)
            layers = np.flatnonzero(upper > lower)
            bounds = np.append(lower[layers] - start, max(stop - start, 0) if len(layers) else 0)
            self._parts[start, stop] = Part(layers, bounds)
        return self._parts[start, stop]


def shard_bounds(total: int, shards: int) -> list[int]:
    """Where each of `shards` nearly equal ranges of a vector begins, and the end."""
    return [total * index // shards for index in range(shards + 1)]
