"""What Adasum costs beside a plain all-reduce of the same gradients, and beside an Adasum that gathers.

    python benchmarks/adasum.py --ranks 2 3 4 --rounds 7

Ranks over gloo on this machine; 161 tensors of 25M and of 0.1M float32 in all. Every round runs each variant once:
- "all_reduce": torch's, of one flat tensor: the link;
- "gather": every rank collects all gradients and combines them by itself, one tensor after the other;
- "rvh", "gram", "auto": `stretto.adasum.all_reduce_`.
Printed: the median time of each, the median of its paired ratios to all_reduce, the memory that calls after the first
have added, and the elements sent per rank as a multiple of the gradients' (2(n-1)/n is the least).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stretto import adasum
from stretto.adasum.reducer import Reducer
from stretto.adasum.transport import TorchTransport, ranges
from torch import Tensor
from torch.multiprocessing.spawn import spawn

TENSORS = 161
VARIANTS = ("all_reduce", "gather", "rvh", "gram", "auto")
LIMITS = {25_000_000: {2: 2.5, 3: 3.0, 4: 3.0}, 100_000: {2: 4.0, 3: 4.0, 4: 4.0}}


class Counting(TorchTransport):
    """Counts the bytes that this rank gives away; a broadcast's are counted where they begin."""

    sent = 0

    def scatter(self, received: Tensor, flat: Tensor, bounds: Sequence[int]) -> None:
        self.sent += sum(stop - start for rank, start, stop in ranges(bounds) if rank != self.rank) * 4
        super().scatter(received, flat, bounds)

    def share(self, flat: Tensor, bounds: Sequence[int]) -> None:
        self.sent += (bounds[self.rank + 1] - bounds[self.rank]) * 4 * (self.world_size - 1)
        super().share(flat, bounds)

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        self.sent += sum(tensor.numel() * tensor.element_size() for _, tensor in sends)
        super().exchange(sends, receives)


def gather_and_combine(tensors: list[Tensor], flat: Tensor) -> None:
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, torch.cat(tensors))
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, result in zip(tensors, adasum.combine([torch.split(row, sizes) for row in rows]), strict=True):
        tensor.copy_(result)


def measure(elements: int, rounds: int) -> dict[str, Any]:
    """Of one size: seconds of each variant in each round; peak memory; bytes sent."""
    sizes = [elements // TENSORS] * TENSORS
    sizes[-1] += elements - sum(sizes)
    tensors, flat = [torch.empty(size) for size in sizes], torch.randn(elements)
    variants: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(flat),
        "gather": lambda: gather_and_combine(tensors, flat),
        "rvh": lambda: adasum.all_reduce_(tensors, algorithm="rvh"),
        "gram": lambda: adasum.all_reduce_(tensors, algorithm="gram"),
        "auto": lambda: adasum.all_reduce_(tensors),
    }
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    grown = 0
    for turn in range(rounds + 1):  # the first one warms up
        for name in VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]:
            for tensor in (flat, *tensors):
                tensor.normal_()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            dist.barrier()
            started_s = time.perf_counter()
            variants[name]()
            if turn:
                times[name].append(time.perf_counter() - started_s)
                if name in ("rvh", "gram", "auto"):
                    grown = max(grown, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    world = dist.group.WORLD
    assert world is not None
    sent = {}
    for name in ("rvh", "gram"):
        transport = Counting(world)
        Reducer(transport, name).reduce(tensors)  # type: ignore[arg-type]  # a literal
        sent[name] = transport.sent / (4 * elements)
    return {"times": times, "grown_kib": grown, "sent": sent}


def rank_main(rank: int, world_size: int, folder: str, options: argparse.Namespace) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {elements: measure(elements, options.rounds) for elements in options.elements}
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def report(world_size: int, by_rank: list[dict[int, dict[str, Any]]]) -> None:
    for elements, found in by_rank[0].items():
        plain = found["times"]["all_reduce"]
        print(f"\n{world_size} ranks, {elements / 1e6:g}M elements in {TENSORS} tensors")
        for name in VARIANTS:
            times = found["times"][name]
            ratio = statistics.median(mine / theirs for mine, theirs in zip(times, plain, strict=True))
            sent = max(rank[elements]["sent"].get(name, 0.0) for rank in by_rank)
            line = f"  {name:10}  {statistics.median(times) * 1e3:8.2f} ms   {ratio:6.2f} x all_reduce"
            print(line + (f"   sent {sent:.2f} N" if sent else ""))
        limit = LIMITS.get(elements, {}).get(world_size)
        print(f"  memory added after the first call: {found['grown_kib'] / 1024:.1f} MiB; limit of auto: {limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--elements", type=int, nargs="+", default=[100_000, 25_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn(rank_main, (world_size, folder, options), nprocs=world_size)  # type: ignore[no-untyped-call]  # torch's
            report(world_size, [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(world_size)])


if __name__ == "__main__":
    main()
