"""trainer.save() where not all ranks call it: nobody hangs, and the checkpoint comes a step later."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
from stretto.checkpoint import Checkpointer
from trainer_run import Plan, make_trainer

SAVED_AT = 5
STEPS = 12


def _rank(folder: Path, rank: int, world_size: int, port: int, callers: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    # Ranks that all come wait for each other as long as it takes; a lone one is to go on soon.
    settings: dict[str, Any] = {"save_meeting_s": 60.0 if len(callers) == world_size else 0.05}
    trainer = make_trainer(Plan(target_tau=1e9, checkpoint=str(folder), settings=settings))
    for report in trainer:
        if report.step == SAVED_AT and rank in callers:
            trainer.save()
            trainer.save()  # once more is no harm
        if report.step == STEPS:
            break


def _saved_steps(folder: Path, callers: tuple[int, ...]) -> list[int]:
    """Where two ranks, some of which call save(), leave checkpoints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stretto.trainer", "trainer_run"])
    processes = [context.Process(target=_rank, args=(folder, rank, 2, port, callers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [int(path.name.split("-")[3]) for path in folder.glob("generation-*")]
    assert all(Checkpointer(folder).verify(path) for path in folder.glob("generation-*"))
    return sorted(found)


def test_where_all_ranks_call_it_the_step_itself_is_saved(tmp_path: Path) -> None:
    assert _saved_steps(tmp_path / "checkpoints", (0, 1)) == [SAVED_AT]


def test_where_one_rank_calls_it_the_next_step_is_saved(tmp_path: Path) -> None:
    for caller in (0, 1):
        assert _saved_steps(tmp_path / f"checkpoints-{caller}", (caller,)) == [SAVED_AT + 1]
