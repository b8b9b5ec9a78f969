"""The copy of a state that is written while training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from stretto.checkpoint.index import Index
from stretto.checkpoint.parts import Part, box_of, dtype_of, size_of


class Staging:
    """One rank's buffer in host memory, used again for each save; it grows when the state does."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, plan: SavePlan, planner: SavePlanner, index: Index) -> Staged:
        """Take what the planner has, laid out as the plan's files; accelerators are waited for once.

        index: what belongs into this rank's index beside the files.
        """
        parts: Sequence[Part] = plan.storage_data
        placed = [
            (item, part.begin + start) for part in parts for item, start in zip(part.items, part.starts, strict=True)
        ]
        sources = [planner.resolve_data(item) for item, _ in placed]
        pinned = any(isinstance(source, Tensor) and source.is_cuda for source in sources)
        self._reserve(parts[-1].end if parts else 0, pinned=pinned)
        views: dict[int, Tensor] = {}
        for (item, begin), source in zip(placed, sources, strict=True):
            assert isinstance(source, Tensor), "only tensors are planned"
            view = self._buffer[begin : begin + size_of(item)].view(dtype_of(item)).view(box_of(item)[1])
            view.copy_(source, non_blocking=True)
            views[id(item)] = view
        if pinned:
            torch.cuda.synchronize()
        return Staged(plan, views, index)

    def _reserve(self, size_bytes: int, *, pinned: bool) -> None:
        if self._buffer.numel() < size_bytes or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)


class Staged(SavePlanner):
    """A plan that is settled, and the values that it had: what DCP's storage writers take in the background."""

    def __init__(self, plan: SavePlan, views: dict[int, Tensor], index: Index) -> None:
        self._plan = plan
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
