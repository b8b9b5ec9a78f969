"""Saved by m ranks, loaded by n, for all m and n in 1..8, DDP and FSDP2 alike: bit by bit what was saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from saving.fsdp_ranks import launch, make_state, step
from stretto.checkpoint import Checkpointer, CheckpointSettings
from stretto.transfer import fingerprint
from torch import Tensor
from torch.distributed.tensor import DTensor

MODES = ("ddp", "fsdp")
SIZES = range(1, 9)


def _whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a state by name, put together from all ranks' parts. On all ranks."""
    model = getattr(state["model"], "module", state["model"])
    found = dict(_tensors(model.state_dict(), "model"))
    found.update(_tensors(state["optimizer"].state_dict()["state"], "optimizer"))
    return found


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, DTensor):
        yield name, value.full_tensor()
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")


def _save(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Each way of training, two steps of it and a checkpoint; what was saved, in short."""
    found = {}
    for mode in MODES:
        state = make_state(mode, world_size)
        for number in range(2):
            step(state, number + world_size, rank, world_size)
        settings = CheckpointSettings(part_bytes=150)
        Checkpointer(folder / f"{mode}-{world_size}", settings=settings).save(state, step=world_size)
        found[f"{mode}-{world_size}"] = fingerprint(_whole(state))
    return found


def _load(rank: int, world_size: int, folder: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Every checkpoint in every mode: what was loaded, in short."""
    found = {}
    for (saved_as, saved_by), mode in itertools.product(itertools.product(MODES, sizes), MODES):
        state = make_state(mode, world_size)
        info = Checkpointer(folder / f"{saved_as}-{saved_by}").load_latest(state)
        assert info is not None
        assert (info.step, info.passed_over) == (saved_by, ())
        found[f"{saved_as}-{saved_by} as {mode}"] = fingerprint(_whole(state))
        dist.barrier()
    return found


def _check(folder: Path, saved_by: Sequence[int], loaded_by: Sequence[int]) -> int:
    saved: dict[str, int] = {}
    for world_size in saved_by:
        first, *others = launch(_save, world_size, folder, folder)
        assert all(each == first for each in others), f"the {world_size} ranks hold different states"
        saved.update(first)
    checked = 0
    for world_size in loaded_by:
        for rank, result in enumerate(launch(_load, world_size, folder, folder, list(saved_by))):
            for what, found in result.items():
                assert found == saved[what.partition(" ")[0]], f"{what} on rank {rank} of {world_size}"
                checked += 1
    return checked


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_some_sizes_load_what_some_others_saved(tmp_path: Path) -> None:
    assert _check(tmp_path / "checkpoints", (3, 8), (1, 5)) == (1 + 5) * 2 * 4


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_sizes_load_what_all_others_saved(tmp_path: Path) -> None:
    assert _check(tmp_path / "checkpoints", SIZES, SIZES) == sum(SIZES) * len(SIZES) * 4
