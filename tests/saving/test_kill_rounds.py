"""All processes are killed at random moments, again and again; each time training goes on from a verified state."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stretto.checkpoint import Checkpointer
from trainer_run import SAMPLES, Plan, make_trainer

INTERVAL = 10
BATCH = 12
LIMIT_S = 60.0


def _plan(folder: Path | None) -> Plan:
    """A fixed global batch and a rule that estimates nothing: no step depends on the number of workers."""
    settings: dict[str, Any] = {"checkpoint_interval_steps": INTERVAL}
    return Plan(
        target_tau=1e9,
        global_batch_size=BATCH,
        batch_size=5,
        base_batch_size=BATCH,
        rule="identity",
        lr=0.01,
        checkpoint=None if folder is None else str(folder / "checkpoints"),
        settings=settings,
    )


def _rank(folder: Path, rank: int, world_size: int, port: int, file: Path) -> None:
    """Train until killed; rank 0 writes a line per step."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for report in make_trainer(_plan(folder)):
        if rank == 0:
            line = {"step": report.step, "tau": report.tau, "samples": report.samples, "loss": report.loss}
            os.write(descriptor, (json.dumps(line) + "\n").encode())


@dataclass
class Reference:
    """What an undisturbed run on one process says of each step."""

    steps: list[dict[str, float]]

    @classmethod
    def run(cls, steps: int) -> Reference:
        found = []
        for report in make_trainer(_plan(None)):
            found.append({"tau": report.tau, "samples": report.samples, "loss": report.loss})
            if report.step == steps:
                break
        return cls(found)

    def check(self, line: dict[str, float]) -> None:
        expected = self.steps[int(line["step"]) - 1]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), f"step {line['step']}"
        assert (line["tau"], line["samples"]) == (expected["tau"], expected["samples"])


def _lines(file: Path) -> list[dict[str, float]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _round(folder: Path, number: int, rng: random.Random) -> list[dict[str, float]]:
    """Train on some ranks, kill them all at a random moment; what rank 0 said."""
    context = multiprocessing.get_context("forkserver")  # warm: it has imported everything
    context.set_forkserver_preload(["stretto.trainer", "trainer_run"])
    world_size, file = rng.randint(1, 3), folder / f"round-{number}.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(folder, rank, world_size, port, file), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    steps, delay_s, until_s = rng.randrange(1, 4 * INTERVAL), rng.uniform(0.0, 0.02), time.monotonic() + LIMIT_S
    while len(_lines(file)) < steps:
        assert time.monotonic() < until_s, f"round {number}: {len(_lines(file))} of {steps} steps"
        assert all(process.is_alive() for process in processes), f"round {number}: a rank has ended"
        time.sleep(0.001)
    time.sleep(delay_s)  # a moment that no step boundary chooses
    for process in rng.sample(processes, world_size):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(LIMIT_S)
    return _lines(file)


def _resumed(folder: Path, reference: Reference) -> int:
    """The step that the next round goes on from; its parts belong together."""
    state: dict[str, Any] = dict.fromkeys(("optimizer", "sampler", "training", "model"))
    info = Checkpointer(folder / "checkpoints").load_latest(state)
    if info is None:
        return 0
    assert Checkpointer(folder / "checkpoints").verify(info.path)
    expected = reference.steps[info.step - 1]
    epochs, steps = divmod(info.step, -(-SAMPLES // BATCH))
    assert state["training"]["step"] == info.step
    assert state["training"]["samples"] == expected["samples"]
    assert state["optimizer"]["adascale"]["tau"] == info.tau == expected["tau"]
    assert (state["sampler"]["epoch"], state["sampler"]["consumed"]) == (epochs, steps * BATCH)
    return info.step


def _rounds(folder: Path, count: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    reference, last, resumed = Reference.run(count * 5 * INTERVAL), 0, 0
    for number in range(count):
        lines = _round(folder, number, rng)
        assert lines[0]["step"] == resumed + 1, f"round {number} went on elsewhere"
        for line in lines:
            reference.check(line)
        last = max(last, int(lines[-1]["step"]))
        resumed = _resumed(folder, reference)
        assert lines[-1]["step"] - resumed <= INTERVAL, f"round {number} lost more than one interval"
    assert last > count * INTERVAL / 2, "the rounds are too short to prove anything"


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_every_restart_goes_on_from_a_verified_state_and_loses_one_interval_at_most(tmp_path: Path) -> None:
    _rounds(tmp_path, 20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_restarts(tmp_path: Path) -> None:
    _rounds(tmp_path, 200)
