"""What a checkpoint costs training, beside torch.save and torch.load of the same state in the same run.

    python benchmarks/checkpoint.py --parameters 100e6 --rounds 5 --ranks 2

A model of so many float32 parameters with SGD's momentum (100e6: 800 MB), on one rank and on `--ranks`, which hold
replicas as DDP's do. Every round, in rotated order:
- "torch.save": rank 0 writes all of it while training stands still, then fsync, as ours does;
- "stall": the time of `Checkpointer.begin`, which is all that training waits for;
- "steps": steps of a small model meanwhile, as a share of those in the same time before;
- "write": `Checkpointer.save`, until the checkpoint is committed;
- "torch.load" and "load": into a model and an optimizer that are there, ours with every byte checked.
Printed: medians, paired ratios, GB/s, and bytes written. The first round warms up, and is not counted. `--check` ends
with 1 where a figure misses its goal: stall at most 0.1 of torch.save; steps at least 0.85; write and load no slower.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stretto.checkpoint import Checkpointer, CheckpointSettings
from torch import nn

_WIDTH = 2048


def make_state(parameters: int) -> dict[str, Any]:
    """Layers of about 4M parameters, and their momentum."""
    layers = max(parameters // _WIDTH**2, 1)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


class Bench:
    """One rank: the variants, each of which returns its figures."""

    def __init__(self, folder: Path, rank: int, options: argparse.Namespace) -> None:
        self._folder = folder
        self._rank = rank
        self._state = make_state(int(options.parameters))
        self._other = make_state(int(options.parameters))
        settings = CheckpointSettings(write_threads=options.threads)
        self._checkpointer = Checkpointer(folder / "ours", keep=1, settings=settings)
        self._step = 0
        self._small = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        self._batch = torch.randn(64, 256)
        tensors = [*self._state["model"].state_dict().values()]
        self.size_bytes = 2 * sum(each.nbytes for each in tensors)

    def torch_save(self) -> dict[str, float]:
        if self._rank:
            return {}
        begun_s = time.perf_counter()
        with (self._folder / "theirs.pt").open("wb") as file:
            torch.save({name: value.state_dict() for name, value in self._state.items()}, file)
            file.flush()
            saved_s = time.perf_counter() - begun_s
            os.fsync(file.fileno())
        return {"torch.save": saved_s, "torch.save and fsync": time.perf_counter() - begun_s}

    def torch_load(self) -> dict[str, float]:
        begun_s = time.perf_counter()
        found = torch.load(self._folder / "theirs.pt", weights_only=True)
        for name, value in self._other.items():
            value.load_state_dict(found[name])
        return {"torch.load": time.perf_counter() - begun_s}

    def stall_and_steps(self) -> dict[str, float]:
        usual = self._rate(1.0, lambda: False)
        stall_s = self._begin()
        meanwhile = self._rate(60.0, lambda: not self._checkpointer.busy)
        self._finish()
        return {"stall": stall_s, "steps": meanwhile / usual}

    def write(self) -> dict[str, float]:
        begun_s = time.perf_counter()
        self._step += 1
        self._checkpointer.save(self._state, step=self._step)
        return {"write": time.perf_counter() - begun_s}

    def load(self) -> dict[str, float]:
        begun_s = time.perf_counter()
        if self._checkpointer.load_latest(self._other) is None:
            raise AssertionError("nothing was loaded")
        return {"load": time.perf_counter() - begun_s}

    def bytes_written(self) -> int:
        (newest,) = (self._folder / "ours").glob("generation-*")
        return sum(file.stat().st_size for file in newest.iterdir())

    def _begin(self) -> float:
        self._step += 1
        begun_s = time.perf_counter()
        if not self._checkpointer.begin(self._state, step=self._step):
            raise AssertionError("a save was still running")
        return time.perf_counter() - begun_s

    def _finish(self) -> None:
        self._checkpointer.wait()
        outcome = self._checkpointer.poll()
        if type(outcome).__name__ != "Saved":
            raise AssertionError(f"the save ended as {outcome}")

    def _rate(self, limit_s: float, over: Callable[[], bool]) -> float:
        """Steps per second of the small model, for so long or until it is over."""
        begun_s, steps = time.perf_counter(), 0
        while True:
            self._small(self._batch).square().mean().backward()
            steps += 1
            passed_s = time.perf_counter() - begun_s
            if passed_s > limit_s or over():
                return steps / passed_s


def run_rank(rank: int, world_size: int, port: int, folder: Path, options: argparse.Namespace) -> None:
    """All rounds on one rank; rank 0 leaves its figures in a file."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    bench = Bench(folder, rank, options)
    found: dict[str, list[float]] = {}
    savers = [bench.torch_save, bench.stall_and_steps, bench.write]
    for number in range(options.rounds + 1):
        turn = number % len(savers)
        for variant in [*savers[turn:], *savers[:turn], bench.torch_load, bench.load]:
            if world_size > 1:
                dist.barrier()
            for name, value in variant().items():
                if number:
                    found.setdefault(name, []).append(value)
    if rank == 0:
        result = {"size_bytes": bench.size_bytes, "bytes_written": bench.bytes_written(), "found": found}
        (folder / "result.json").write_text(json.dumps(result))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(world_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks and return rank 0's figures."""
    folder = Path(tempfile.mkdtemp(prefix="stretto-checkpoint-", dir=options.folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    try:
        ranks = [
            context.Process(target=run_rank, args=(rank, world_size, port, folder, options))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank ended with {[process.exitcode for process in ranks]}")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(world_size: int, result: dict[str, Any]) -> list[str]:
    """Print one world size's figures; what misses its goal, in words."""
    found, size_bytes = result["found"], result["size_bytes"]

    def ratio(ours: str, theirs: str) -> float:
        pairs = zip(found[ours], found[theirs], strict=True)
        return float(statistics.median(a / b for a, b in pairs))

    print(f"{world_size} rank(s), {size_bytes / 1e6:.0f} MB; {result['bytes_written'] / size_bytes:.4f} of it written")
    for name, values in found.items():
        unit = "" if name == "steps" else " s"
        speed = "" if name in ("steps", "stall") else f"  {size_bytes / statistics.median(values) / 1e9:.2f} GB/s"
        print(f"  {name:22} {statistics.median(values):8.3f}{unit}{speed}")
    figures = {
        "stall / torch.save": (ratio("stall", "torch.save"), "<=", 0.1),
        "steps meanwhile / usual": (statistics.median(found["steps"]), ">=", 0.85),
        "write / torch.save and fsync": (ratio("write", "torch.save and fsync"), "<=", 1.0),
        "write / torch.save": (ratio("write", "torch.save"), "", 0.0),
        "load / torch.load": (ratio("load", "torch.load"), "<=", 1.0),
    }
    missed = []
    for name, (value, sign, goal) in figures.items():
        met = not sign or (value <= goal if sign == "<=" else value >= goal)
        print(f"  {name:30} {value:6.3f}" + (f"  ({sign} {goal:g}: {'yes' if met else 'NO'})" if sign else ""))
        if not met:
            missed.append(f"{name} on {world_size} rank(s): {value:.3f}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="the second world size; the first is 1")
    parser.add_argument("--threads", type=int, default=1, help="that write in the background, per rank")
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    missed: list[str] = []
    for world_size in sorted({1, options.ranks}):
        missed += report(world_size, measure(world_size, options))
    if missed:
        print("missed: " + "; ".join(missed))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
