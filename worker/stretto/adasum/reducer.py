"""Reducer: Adasum of lists of tensors or of one flat vector, over one group, with buffers that it keeps."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stretto.adasum.checks import Traits, begin_agreement, digests, problem_of, unknown
from stretto.adasum.gram import reduce_by_gram
from stretto.adasum.memory import Memory
from stretto.adasum.rvh import reduce_by_halving
from stretto.adasum.segments import Segments
from stretto.adasum.statistics import Statistics, joined
from stretto.adasum.transport import Numbers, PeerTransport, TorchTransport, Transport
from stretto.adasum.tree import Leaves, single_ranks

Algorithm = Literal["auto", "rvh", "gram"]

ALGORITHMS = ("auto", "rvh", "gram")
# From here on Gram matrices are larger than all the tables that "rvh" exchanges.
_MANY_RANKS = 8
# Lists of tensors whose layout is remembered.
_KEPT_LAYOUTS = 16
_NO_TENSOR = "give a tensor, zeros for a parameter that has no gradient on this rank"
_TRAITS_OF = attrgetter("shape", "dtype", "device", "layout")


@dataclass(frozen=True)
class _Batch:
    """The tensors of one dtype and device: their numbers in the list, their sizes, their places in a flat vector."""

    indices: tuple[int, ...]
    segments: Segments
    # Views into the flat vector, and where that was when they were made.
    views: list[Tensor] = field(default_factory=list)
    address: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class _Layout:
    traits: Traits
    batches: tuple[_Batch, ...]


class Reducer:
    """Combines gradients over the ranks of one transport; one call at a time, all ranks in the same order.

    `leaves`: the ranks as the tree takes them, by default in their order; several ranks in one leaf are averaged
    first (the mean inside a node, Adasum between nodes), which algorithm "gram" does within its three collectives.
    """

    def __init__(self, transport: Transport, algorithm: Algorithm = "auto", leaves: Leaves | None = None) -> None:
        self._transport = transport
        self.leaves = leaves or single_ranks(transport.world_size)
        if sorted(rank for ranks in self.leaves for rank in ranks) != list(range(transport.world_size)):
            raise ValueError(
                f"leaves are {self.leaves}; allowed: every rank from 0 to {transport.world_size - 1} in exactly one"
            )
        self.algorithm = checked_algorithm(algorithm)
        single = all(len(ranks) == 1 for ranks in self.leaves)
        if algorithm == "rvh" and not (single and transport.peers):
            raise ValueError(
                'algorithm "rvh" combines single ranks that send to each other one by one; take "gram" or "auto" with '
                "nodes that are averaged first, and in live workers"
            )
        self._can_halve = single and transport.peers
        self._memory = Memory()
        self._layouts: OrderedDict[object, _Layout] = OrderedDict()
        # Compared before anything is hashed.
        self._latest: tuple[object, _Layout | None] = None, None

    @property
    def world_size(self) -> int:
        return self._transport.world_size

    @torch.no_grad()
    def reduce_flat(self, flat: Tensor, segments: Segments, algorithm: Algorithm | None = None) -> Statistics:
        """Overwrite a contiguous vector with the Adasum of all ranks', layer by layer.

        The ranks are trusted to give the same layers: what differs hangs or fails in torch.
        """
        chosen = algorithm or self.algorithm
        if chosen == "auto":
            chosen = self.choice(flat, len(segments))
        if self._transport.world_size == 1:
            return self._alone(flat, segments)
        if segments.total == 0:
            return Statistics(np.zeros(len(segments)), np.zeros(len(segments)), 0.0)
        if chosen == "gram":
            return reduce_by_gram(flat, segments, self.leaves, self._transport, self._memory)
        order = [ranks[0] for ranks in self.leaves]
        return reduce_by_halving(flat, segments, order, cast(PeerTransport, self._transport), self._memory)

    @torch.no_grad()
    def reduce(self, tensors: Sequence[Tensor], algorithm: Algorithm | None = None, problem: str = "") -> Statistics:
        """Overwrite each tensor with the Adasum of all ranks' tensors in its place.

        Raises ValueError on every rank, and changes nothing, where the ranks' lists differ in number, shapes, dtypes,
        devices or algorithm, or a rank has tensors that cannot be combined, or a `problem` of its own.
        """
        chosen = algorithm or self.algorithm
        layout = None
        if not problem:
            layout, problem = self._layout_of(tensors, chosen)
        traits = layout.traits if layout is not None else unknown()
        agree = begin_agreement(self._transport, traits, problem)
        if layout is None:
            agree()
            raise ValueError(problem)
        found: list[Statistics] = []
        for batch in layout.batches:
            members = [tensors[index] for index in batch.indices]
            flat, views = _adjacent(members, batch.segments.total), list[Tensor]()
            if flat is None:
                flat, views = self._packed(batch, members)
                torch._foreach_copy_(views, members)  # while the ranks compare what they have
            if not found:
                agree()
            found.append(self.reduce_flat(flat, batch.segments, chosen))
            if views:
                torch._foreach_copy_(members, views)
        if not found:
            agree()
        return joined(found)

    def _packed(self, batch: _Batch, members: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The kept flat vector for these tensors, and what is theirs in it."""
        flat = self._memory.take("flat", batch.segments.total, members[0])
        if flat.data_ptr() != batch.address[0] or not batch.views:
            batch.address[0] = flat.data_ptr()
            parts = torch.split(flat, batch.segments.sizes.tolist())
            batch.views[:] = [part.view(member.shape) for part, member in zip(parts, members, strict=True)]
        return flat, batch.views

    def _layout_of(self, tensors: Sequence[Tensor], algorithm: str) -> tuple[_Layout | None, str]:
        """Found anew where anything differs from a list that was seen before."""
        try:
            key = (algorithm, tuple(map(_TRAITS_OF, tensors)))
        except AttributeError:
            return None, next(
                f"tensor {i} is {t!r}; {_NO_TENSOR}" for i, t in enumerate(tensors) if not torch.is_tensor(t)
            )
        layout = self._latest[1] if key == self._latest[0] else self._layouts.get(key)
        if layout is None:
            for index, tensor in enumerate(tensors):
                problem = problem_of(f"tensor {index}", tensor)
                if problem:
                    return None, problem
            kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
            for index, tensor in enumerate(tensors):
                kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
            batches = [
                _Batch(tuple(indices), Segments([tensors[index].numel() for index in indices]))
                for indices in kinds.values()
            ]
            layout = _Layout(digests(tensors, algorithm), tuple(batches))
            self._layouts[key] = layout
            if len(self._layouts) > _KEPT_LAYOUTS:
                self._layouts.popitem(last=False)
        self._latest = key, layout
        return layout, ""

    def choice(self, flat: Tensor, layers: int) -> Algorithm:
        """The rule of "auto"; docs/adasum.md has the measurements."""
        count = self._transport.world_size
        # Half precision would be rounded once per level, and float64 above 1e154 needs what "gram" does about it.
        if not self._can_halve or flat.device.type != "cpu" or flat.dtype != torch.float32 or count < _MANY_RANKS:
            return "gram"
        table_bytes = 8 * layers * count * (count + 1) // 2
        return "rvh" if table_bytes > flat.numel() * flat.element_size() else "gram"

    def _alone(self, flat: Tensor, segments: Segments) -> Statistics:
        part = segments.part(0, segments.total)
        squares = np.zeros(len(segments))
        if segments.total:
            squares[part.layers] = self._memory.kernel(1, flat.device).dots([flat], part)[0]
        return Statistics(squares, squares, float(squares.sum()))


def checked_algorithm(algorithm: str) -> Algorithm:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
    return cast(Algorithm, algorithm)


def reducer_of(group: dist.ProcessGroup | None) -> Reducer:
    """The one of this process group, with its buffers; they go when the group does."""
    if not dist.is_available() or not dist.is_initialized():
        return Reducer(Alone())
    group = group or dist.group.WORLD
    assert group is not None, "an initialised torch.distributed has a default group"
    if group not in _reducers:
        _reducers[group] = Reducer(TorchTransport(group))
    return _reducers[group]


_reducers: weakref.WeakKeyDictionary[dist.ProcessGroup, Reducer] = weakref.WeakKeyDictionary()


class Alone:
    """A world of one rank, without torch.distributed."""

    rank, world_size, peers = 0, 1, False

    def sum_(self, numbers: Numbers) -> None: ...

    def start_max(self, numbers: Numbers) -> Callable[[], None]:
        return lambda: None

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        received.copy_(flat)

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None: ...


def _adjacent(tensors: Sequence[Tensor], total: int) -> Tensor | None:
    """The flat vector that the tensors are views of, one after the other without gaps, or None."""
    first = tensors[0]
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    if not storage:
        return None
    for tensor in tensors:
        here = tensor.storage_offset() == place and tensor.untyped_storage().data_ptr() == storage
        if not here or not tensor.is_contiguous():
            return None
        place += tensor.numel()
    return first.as_strided((total,), (1,), first.storage_offset())
