"""Every byte of the state is written once, the ranks' shares are equal, and any number of ranks can load them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving.likeness import same
from saving.ranks import on_ranks
from saving.training import train, training_state
from stretto.checkpoint import Checkpointer, CheckpointFailed, CheckpointSettings
from stretto.checkpoint.parts import box_of, size_of
from stretto.checkpoint.share import SharePlanner
from torch import Tensor, nn

shapes = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), max_size=6)


def _boxes(tensors: dict[str, Tensor], world_size: int, item_bytes: int) -> list[list[Any]]:
    plans = []
    for rank in range(world_size):
        planner = SharePlanner(rank, world_size, owners={}, item_bytes=item_bytes)
        planner.set_up_planner(tensors)
        plans.append(planner.create_local_plan().items)
    return plans


@settings(deadline=None)
@given(shapes, st.integers(1, 8), st.sampled_from([4, 30, 1000]))
def test_each_element_is_in_one_item_of_one_rank(
    shapes: list[tuple[int, ...]], world_size: int, item_bytes: int
) -> None:
    tensors = {str(number): torch.zeros(shape) for number, shape in enumerate(shapes)}
    seen = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    named = set()
    for item in itertools.chain(*_boxes(tensors, world_size, item_bytes)):
        part = seen[item.index.fqn]
        named.add(item.index.fqn)
        for dimension, (offset, size) in enumerate(zip(*box_of(item), strict=True)):
            part = part.narrow(dimension, offset, size)
        part += 1
        rows_only_bytes = 7 * 7 * 4
        assert size_of(item) <= max(item_bytes, rows_only_bytes)
    assert all(bool((each == 1).all()) for each in seen.values())
    assert named == set(tensors)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shares_are_equal_in_bytes(world_size: int) -> None:
    tensors = {"embedding": torch.zeros(5000, 16), "weight": torch.zeros(64, 64), "bias": torch.zeros(64)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    for items in _boxes(tensors, world_size, 1 << 20):
        assert abs(sum(map(size_of, items)) - total / world_size) <= 3 * 64 * 4, "a row more or less of each"


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_the_state_is_written_once_whatever_the_number_of_ranks(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    for world_size in (1, 2, 5, 8):
        (path, *_) = on_ranks(world_size, tmp_path / str(world_size), lambda _, c: c.save({"model": model}, step=1))
        assert _bytes_of(Path(path)) <= sum(p.nbytes for p in model.parameters()) + 400 * world_size, "and headers"


@pytest.mark.parametrize("saved_by", range(1, 9))
def test_any_number_of_ranks_loads_what_any_number_saved(saved_by: int, tmp_path: Path) -> None:
    state = training_state()
    for seed in range(3):
        train(state, seed)
    on_ranks(saved_by, tmp_path, lambda _, c: c.save(state, step=3, tau=3.0), CheckpointSettings(part_bytes=200))

    def load(rank: int, checkpointer: Checkpointer) -> dict[str, Any]:
        loaded = training_state(rank + 1)
        info = checkpointer.load_latest(loaded)
        assert info is not None
        assert info.step == 3
        return loaded

    for loaded_by in range(1, 9):
        for loaded in on_ranks(loaded_by, tmp_path, load):
            assert same(loaded["model"].state_dict(), state["model"].state_dict())
            assert same(loaded["optimizer"].state_dict(), state["optimizer"].state_dict())
            assert loaded["note"] == state["note"]


class OwnThing:
    """State that is each rank's own."""

    per_rank = True

    def __init__(self, rank: int) -> None:
        self.value = torch.full((3,), float(rank))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "words": f"rank {int(self.value[0])}"}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self.value = d["value"]


def test_what_differs_by_rank_comes_back_to_its_rank(tmp_path: Path) -> None:
    on_ranks(3, tmp_path, lambda rank, c: c.save({"own": OwnThing(rank), "x": torch.arange(9.0)}, step=1))

    def load(rank: int, checkpointer: Checkpointer) -> float:
        own = OwnThing(99)
        assert checkpointer.load_latest({"own": own, "x": None}) is not None
        return float(own.value[0])

    assert on_ranks(3, tmp_path, load) == [0, 1, 2]
    assert on_ranks(5, tmp_path, load) == [0, 1, 2, 0, 1], "more ranks than saved share what there is"


def test_buffers_are_rank_0s(tmp_path: Path) -> None:
    def save(rank: int, checkpointer: Checkpointer) -> str:
        model = nn.BatchNorm1d(64)
        model.running_mean.fill_(rank)  # type: ignore[union-attr]  # it tracks them
        return checkpointer.save({"model": model}, step=1)

    on_ranks(3, tmp_path, save)
    model = nn.BatchNorm1d(64)
    Checkpointer(tmp_path).load_latest({"model": model})
    assert model.running_mean is not None
    assert torch.equal(model.running_mean, torch.zeros(64))


def test_a_share_that_does_not_come_fails_the_save_within_its_limit(tmp_path: Path) -> None:
    class TwoRanks:
        rank, world_size = 0, 2

        def add_up(self, numbers: Any) -> list[int]:
            return list(numbers)

    checkpointer = Checkpointer(tmp_path, peers=TwoRanks(), settings=CheckpointSettings(shares_limit_s=0.05))
    with pytest.raises(CheckpointFailed, match=r"the shares of ranks 1 did not come within 0.05 s"):
        checkpointer.save({"x": torch.ones(4)}, step=1)
    assert list(tmp_path.glob("generation-*")) == []


def test_a_rank_that_cannot_write_its_share_says_why_to_rank_0(tmp_path: Path) -> None:
    def save(rank: int, checkpointer: Checkpointer) -> str:
        if rank == 1:
            checkpointer._store.write = _refuse(checkpointer._store.write)  # type: ignore[method-assign]
        try:
            checkpointer.save({"x": torch.ones(40)}, step=1)
        except CheckpointFailed as error:
            return str(error)
        return "saved"

    def _refuse(write: Any) -> Any:
        def refusing(path: str, chunks: Any, *, direct: bool = False) -> None:
            if path.endswith(".safetensors"):
                raise PermissionError(13, "Permission denied")
            write(path, chunks, direct=direct)

        return refusing

    first, second = on_ranks(2, tmp_path, save)
    assert "rank 1 could not write its share: no permission" in first
    assert "no permission" in second


def test_ranks_that_hold_different_states_are_told(tmp_path: Path) -> None:
    def save(rank: int, checkpointer: Checkpointer) -> str:
        try:
            return checkpointer.save({"x": torch.ones(40 + 10 * rank)}, step=1)
        except CheckpointFailed as error:
            return str(error)

    assert "x is F32[40] on one rank and F32[50] on rank 1" in on_ranks(2, tmp_path, save)[0]
