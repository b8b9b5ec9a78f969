"""The copy of a state that is written while training goes on."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from stretto.checkpoint.index import Index
from stretto.checkpoint.parts import Part, box_of, dtype_of, size_of

_WORTH_THREADS_BYTES = 16 << 20
_TOUCHED_BYTES = 16 << 20  # at once, so that a process may end meanwhile


class Staging:
    """One rank's buffer in host memory, used again for each save; it grows when the state does."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._preparing: threading.Thread | None = None

    def prepare(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Have memory for such a plan, in the background: new memory costs many times what a copy does."""
        self._await_memory()
        size_bytes = plan.storage_data[-1].end if plan.storage_data else 0
        pinned = any(_on_cuda(planner.resolve_data(item)) for item in plan.items)

        def touch() -> None:
            if self._reserve(size_bytes, pinned=pinned) and not pinned:
                for begin in range(0, size_bytes, _TOUCHED_BYTES):
                    self._buffer[begin : begin + _TOUCHED_BYTES].zero_()

        self._preparing = threading.Thread(target=touch, name="stretto-memory", daemon=True)
        self._preparing.start()

    def copy(self, plan: SavePlan, planner: SavePlanner, index: Index) -> Staged:
        """Take what the planner has, laid out as the plan's files; accelerators are waited for once.

        index: what belongs into this rank's index beside the files.
        """
        self._await_memory()
        parts: Sequence[Part] = plan.storage_data
        placed = [
            (item, part.begin + len(part.header) + start)
            for part in parts
            for item, start in zip(part.items, part.starts, strict=True)
        ]
        sources = [planner.resolve_data(item) for item, _ in placed]
        pinned = any(map(_on_cuda, sources))
        self._reserve(parts[-1].end if parts else 0, pinned=pinned)
        for part in parts:
            header = torch.frombuffer(bytearray(part.header), dtype=torch.uint8)
            self._buffer[part.begin : part.begin + len(header)] = header
        views: dict[int, Tensor] = {}
        for item, begin in placed:
            views[id(item)] = self._buffer[begin : begin + size_of(item)].view(dtype_of(item)).view(box_of(item)[1])
        pairs = list(zip(views.values(), sources, strict=True))
        if pinned or sum(view.nbytes for view, _ in pairs) < _WORTH_THREADS_BYTES:
            _copy_all(pairs)  # an accelerator's stream is this thread's
        else:
            self._copy_in_threads(pairs)
        if pinned:
            torch.cuda.synchronize()
        return Staged(plan, self._buffer, views, index)

    def _copy_in_threads(self, pairs: list[tuple[Tensor, Any]]) -> None:
        """Several read memory faster than one; each has about as much to do."""
        ordered = sorted(pairs, key=lambda pair: -pair[0].nbytes)
        with ThreadPoolExecutor(self._threads, "stretto-copy") as pool:
            list(pool.map(_copy_all, [ordered[number :: self._threads] for number in range(self._threads)]))

    def _await_memory(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _reserve(self, size_bytes: int, *, pinned: bool) -> bool:
        """Whether the memory is new."""
        if self._buffer.numel() >= size_bytes and (self._buffer.is_pinned() or not pinned):
            return False
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first
        self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True) if pinned else _pages(size_bytes)
        return True


def _pages(size_bytes: int) -> Tensor:
    """Memory that begins at a page's beginning, and that a child process gets a copy of; in huge pages if possible."""
    area = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def _on_cuda(source: object) -> bool:
    return isinstance(source, Tensor) and source.is_cuda


def _copy_all(pairs: list[tuple[Tensor, Any]]) -> None:
    for view, source in pairs:
        assert isinstance(source, Tensor), "only tensors are planned"
        view.copy_(source, non_blocking=True)


class Staged(SavePlanner):
    """A plan that is settled, and the files' bytes as they were: what a storage writer takes in the background."""

    def __init__(self, plan: SavePlan, buffer: Tensor, views: dict[int, Tensor], index: Index) -> None:
        self._plan = plan
        self._buffer = buffer
        self._views = views
        self._index = index

    def set_up_planner(
        self, state_dict: dict[str, Tensor], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """There is nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        return self._plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({}, planner_data=self._index)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._views[id(write_item)]

    def file(self, part: Part) -> memoryview:
        """A whole file, header and all."""
        return self._buffer[part.begin : part.end].numpy().data
