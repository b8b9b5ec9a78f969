"""What a checkpoint costs training, beside torch.save and torch.load of the same state in the same run.

    python benchmarks/checkpoint.py --parameters 100e6

A model of so many float32 parameters with SGD's momentum (100e6: 800 MB): on one rank, on `--ranks` that hold replicas
as DDP's do, and on as many that hold FSDP2's shards. Every round, in rotated order:
- "torch.save": one rank writes all of it to one file, which it overwrites, then fsync, as ours does;
- "stall": the time of `Checkpointer.begin`, which is all that training waits for;
- "steps": of a small model while that is written, beside those in the same run before and after it;
- "write": `Checkpointer.save`, until the checkpoint is on disk and committed;
- "torch.load" on one rank, and "load" on all, every byte checked: into a model and an optimizer that are there, both
  from files that the page cache has, then ("cold") from files that it has not.
Printed: medians in wall-clock and CPU seconds, then each promise as the median of the rounds' ratios, with PASS or
"short of". Throughput on several ranks is that of the whole job, which loads a replica on each, beside one rank's
torch.save and torch.load. One save in three is read back, which is the default. The first round warms up; no round
begins after `--limit-s`. `--check` ends with 1 where something falls short.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stretto.checkpoint import Checkpointer, CheckpointSettings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

_WIDTH = 2048
_STEPS_S = 1.0
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Case:
    """Who holds the state: `sharded` over the ranks, or a replica on each."""

    ranks: int
    sharded: bool

    def __str__(self) -> str:
        how = "" if self.ranks == 1 else ", shards (FSDP2)" if self.sharded else ", replicas (DDP)"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}{how}"


def make_state(parameters: int, *, sharded: bool = False) -> dict[str, Any]:
    """Layers of about 4M parameters, and their momentum."""
    layers = max(parameters // _WIDTH**2, 1)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


class Stopwatch:
    """Figures by name, in wall-clock and CPU seconds of this process."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        result = work()
        self.found[name] = time.perf_counter() - begun_s
        self.found[f"{name}, CPU"] = time.process_time() - begun_cpu_s
        return result


class Bench:
    """One rank: the variants, each of which notes its figures."""

    def __init__(self, folder: Path, rank: int, case: Case, options: argparse.Namespace) -> None:
        self._folder = folder
        self._rank = rank
        self._case = case
        parameters = int(options.parameters)
        self._state, self._other = (make_state(parameters, sharded=case.sharded) for _ in range(2))
        # torch's side has the whole state on rank 0.
        self._whole, self._whole_other = self._state, self._other
        if case.sharded and rank == 0:
            self._whole, self._whole_other = make_state(parameters), make_state(parameters)
        settings = CheckpointSettings(write_threads=options.threads, write_share=options.share)
        self._checkpointer = Checkpointer(folder / "ours", settings=settings)
        self._checkpointer.prepare(self._state)
        self._step = 0
        self._small = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        self._batch = torch.randn(64, 256)
        self.size_bytes = 2 * sum(each.numel() * each.element_size() for each in self._state["model"].parameters())

    def torch_save(self, watch: Stopwatch) -> None:
        if self._rank == 0:
            watch.time("torch.save and fsync", lambda: self._torch_save(watch))

    def torch_load(self, watch: Stopwatch, name: str = "torch.load") -> None:
        if self._rank == 0:
            watch.time(name, self._torch_load)

    def stall_and_steps(self, watch: Stopwatch) -> None:
        before = self._rate(_STEPS_S, lambda: False)
        self._step += 1
        if not watch.time("stall", lambda: self._checkpointer.begin(self._state, step=self._step)):
            raise AssertionError("a save was still running")
        begun_s = time.perf_counter()
        meanwhile = self._rate(60.0, lambda: not self._checkpointer.busy)
        watch.found["background"] = time.perf_counter() - begun_s
        self._finish()
        after = self._rate(_STEPS_S, lambda: False)
        watch.found["steps"] = 2 * meanwhile / (before + after)

    def write(self, watch: Stopwatch) -> None:
        self._step += 1
        watch.time("write", lambda: self._checkpointer.save(self._state, step=self._step))

    def load(self, watch: Stopwatch, name: str = "load") -> None:
        if watch.time(name, lambda: self._checkpointer.load_latest(self._other)) is None:
            raise AssertionError("nothing was loaded")

    def cache(self, *, keep: bool) -> None:
        """Have the page cache hold the newest files, or none of them."""
        if self._rank:
            return
        for path in [self._folder / "theirs.pt", *self._newest().iterdir()]:
            with path.open("rb", buffering=0) as file:
                if keep:
                    while file.read(_READ_BYTES):
                        pass
                else:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def bytes_written(self) -> int:
        return sum(file.stat().st_size for file in self._newest().iterdir())

    def _newest(self) -> Path:
        return max((self._folder / "ours").glob("generation-*/manifest.json")).parent

    def _torch_save(self, watch: Stopwatch) -> None:
        state = {name: value.state_dict() for name, value in self._whole.items()}
        with (self._folder / "theirs.pt").open("wb") as file:
            watch.time("torch.save", lambda: torch.save(state, file))
            file.flush()
            os.fsync(file.fileno())

    def _torch_load(self) -> None:
        found = torch.load(self._folder / "theirs.pt", weights_only=True)
        for name, value in self._whole_other.items():
            value.load_state_dict(found[name])

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


def run_rank(rank: int, case: Case, port: int, folder: Path, options: argparse.Namespace) -> None:
    """All rounds on one rank; rank 0 leaves its figures in a file."""
    torch.set_num_threads(1)
    if case.ranks > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=case.ranks)
    bench = Bench(folder, rank, case, options)
    begun_s = time.monotonic()
    rounds: list[dict[str, float]] = []
    while len(rounds) < 2 or (len(rounds) <= options.rounds and not _over(begun_s + options.limit_s, case)):
        rounds.append(_round(bench, len(rounds), case))
    if rank == 0:
        found = {name: [each[name] for each in rounds] for name in rounds[0]}
        result = {"size_bytes": bench.size_bytes, "bytes_written": bench.bytes_written(), "found": found}
        (folder / "result.json").write_text(json.dumps(result))
    if case.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _round(bench: Bench, number: int, case: Case) -> dict[str, float]:
    watch = Stopwatch()
    savers = [bench.torch_save, bench.stall_and_steps, bench.write]
    loaders = [bench.torch_load, bench.load]
    turn = number % len(savers)
    for saver in [*savers[turn:], *savers[:turn]]:
        _together(case)
        saver(watch)
    for keep in (True, False):
        for loader, name in [(loaders[each], ("torch.load", "load")[each]) for each in (number % 2, 1 - number % 2)]:
            _together(case)
            bench.cache(keep=keep)
            _together(case)
            loader(watch, name if keep else f"{name}, cold")
    return watch.found


def _together(case: Case) -> None:
    if case.ranks > 1:
        dist.barrier()


def _over(until_s: float, case: Case) -> bool:
    """Rank 0's clock decides for all."""
    over = torch.tensor(float(time.monotonic() > until_s))
    if case.ranks > 1:
        dist.broadcast(over, 0)
    return bool(over)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks and return rank 0's figures."""
    folder = Path(tempfile.mkdtemp(prefix="stretto-checkpoint-", dir=options.folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    try:
        ranks = [
            context.Process(target=run_rank, args=(rank, case, port, folder, options)) for rank in range(case.ranks)
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


def report(case: Case, result: dict[str, Any]) -> list[str]:
    """Print one case's figures and promises; what falls short, in words."""
    found, size_bytes = result["found"], result["size_bytes"]
    first = {name: values[0] for name, values in found.items()}
    found = {name: values[1:] for name, values in found.items()}
    print(f"{case}: {size_bytes / 1e6:.0f} MB, {len(found['write'])} rounds after the first")
    for name, values in found.items():
        if name.endswith("CPU") or name == "steps":
            continue
        middle = statistics.median(values)
        cpu = f"CPU {statistics.median(found[f'{name}, CPU']):6.3f} s" if f"{name}, CPU" in found else ""
        extremes = f"(first {first[name]:.3f} s, slowest {max(values):.3f} s)"
        print(f"  {name:21}{middle:7.3f} s  {size_bytes / middle / 1e9:5.2f} GB/s  {cpu:13}  {extremes}")

    def ratio(above: str, below: str) -> float:
        return float(statistics.median(a / b for a, b in zip(found[above], found[below], strict=True)))

    copies = 1 if case.sharded else case.ranks
    one = case.ranks == 1
    promises = [
        ("stall, of torch.save and fsync", ratio("stall", "torch.save and fsync"), "at most", 0.1),
        ("stall, of torch.save without fsync", ratio("stall", "torch.save"), "at most", 0.1),
        ("stall, of torch.save without fsync, CPU", ratio("stall, CPU", "torch.save, CPU"), "", 0.0),
        ("steps meanwhile, of the usual rate", statistics.median(found["steps"]), "at least", 0.85),
        ("write throughput, of torch.save and fsync", ratio("torch.save and fsync", "write"), "at least", 1.0),
        ("write throughput, of torch.save without", ratio("torch.save", "write"), "", 0.0),
        ("load throughput, of torch.load", copies * ratio("torch.load", "load"), "at least", 1.0),
        ("load throughput, cold, of torch.load", copies * ratio("torch.load, cold", "load, cold"), "at least", 1.0),
        ("load throughput, one rank's", ratio("torch.load", "load"), "", 0.0),
        ("bytes written, of the state's", result["bytes_written"] / size_bytes, "at most", 1.01),
    ]
    missed = []
    for name, value, sign, goal in promises:
        if copies == 1 and name.endswith("one rank's"):
            continue
        met = value <= goal if sign == "at most" else value > goal or (one and value == goal)
        verdict = "" if not sign else f"{'PASS' if met else 'short of'} ({sign} {goal:g})"
        print(f"  {name:42}{value:7.3f}  {verdict}".rstrip())
        if sign and not met:
            missed.append(f"{name}, on {case}: {value:.3f}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=45.0, help="of each case: no round begins after it")
    parser.add_argument("--ranks", type=int, default=2, help="beside one")
    parser.add_argument("--only", type=int, choices=(0, 1, 2), help="one case: one rank, replicas, or shards")
    parser.add_argument("--threads", type=int, default=1, help="that write in the background, per rank")
    parser.add_argument("--share", type=float, default=CheckpointSettings.write_share, help="of a core, for each")
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    cases = [Case(1, False), Case(options.ranks, False), Case(options.ranks, True)]
    missed: list[str] = []
    for case in cases if options.only is None else [cases[options.only]]:
        missed += report(case, measure(case, options))
    print("everything is as promised" if not missed else "short of: " + "; ".join(missed))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
