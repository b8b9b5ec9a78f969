"""What Adasum costs beside a plain all-reduce of the same gradients, and beside an Adasum that gathers.

    python benchmarks/adasum.py --ranks 2 3 4 --rounds 7
    python benchmarks/adasum.py --ranks 2 4 8 --elements --table     # what "auto" rests on

Ranks over gloo on this machine; 161 tensors of 25M and of 0.1M float32 in all. Every round runs each variant once (ten
times as many rounds for the small ones):
- "all_reduce": torch's, of one flat tensor: the link;
- "gather": every rank collects all gradients and combines them by itself, one tensor after the other;
- "rvh", "gram", "auto": `stretto.adasum.all_reduce_`.
Printed, of rank 0: the median wall and CPU time of each, the median of its paired ratios to all_reduce, the memory that
calls after the first have added, and the elements sent per rank, as a multiple of the gradients' (at least 2(n-1)/n).
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
SMALL = 1_000_000
TABLE = ((2_500_000, TENSORS), (100_000, TENSORS), (100_000, 5_000), (100_000, 50_000))
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


def lists_of(elements: int, tensors: int) -> tuple[list[Tensor], Tensor]:
    """Random tensors of nearly equal sizes, and as many elements again in one vector."""
    sizes = [elements // tensors] * tensors
    sizes[-1] += elements - sum(sizes)
    return [torch.randn(size) for size in sizes], torch.randn(elements)


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(elements: int, tensors: int, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Of one size: (wall, CPU) seconds of each variant in each round; memory that was added; elements sent."""
    gradients, flat = lists_of(elements, tensors)
    first, first_flat = [gradient.clone() for gradient in gradients], flat.clone()
    variants: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(flat),
        "gather": lambda: gather_and_combine(gradients, flat),
        "rvh": lambda: adasum.all_reduce_(gradients, algorithm="rvh"),
        "gram": lambda: adasum.all_reduce_(gradients, algorithm="gram"),
        "auto": lambda: adasum.all_reduce_(gradients),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    grown = 0
    for turn in range(rounds + 1):  # the first one warms up
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            torch._foreach_copy_([*gradients, flat], [*first, first_flat])
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            dist.barrier()
            wall_s, cpu_s = clock()
            variants[name]()
            wall_end_s, cpu_end_s = clock()
            if turn:
                times[name].append((wall_end_s - wall_s, cpu_end_s - cpu_s))
                if name in ("rvh", "gram", "auto"):
                    grown = max(grown, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    world = dist.group.WORLD
    assert world is not None
    sent = {}
    for name in ("rvh", "gram"):
        transport = Counting(world)
        Reducer(transport, name).reduce(gradients)  # type: ignore[arg-type]  # a literal
        sent[name] = transport.sent / (4 * elements)
    chosen = Reducer(TorchTransport(world)).choice(flat, tensors)
    return {"times": times, "grown_kib": grown, "sent": sent, "chosen": chosen}


def rank_main(rank: int, world_size: int, folder: str, options: argparse.Namespace) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results: dict[tuple[int, int], dict[str, Any]] = {}
    for elements in options.elements:
        # A small one is over at once, and depends more on when the system lets the ranks run.
        rounds = options.rounds * (1 if elements > SMALL else 10)
        results[elements, TENSORS] = measure(elements, TENSORS, rounds, VARIANTS)
    for elements, tensors in TABLE if options.table else ():
        results[elements, tensors] = measure(elements, tensors, options.rounds, ("rvh", "gram"))
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def report(world_size: int, by_rank: list[dict[tuple[int, int], dict[str, Any]]], *, table: bool) -> None:
    for (elements, tensors), found in by_rank[0].items():
        if "all_reduce" not in found["times"]:
            continue
        print(f"\n{world_size} ranks, {elements / 1e6:g}M elements in {tensors} tensors")
        for name, times in found["times"].items():
            columns = []
            for column, kind in enumerate(("wall", "CPU")):
                plain = [each[column] for each in found["times"]["all_reduce"]]
                mine = [each[column] for each in times]
                ratio = statistics.median(one / other for one, other in zip(mine, plain, strict=True))
                columns.append(f"{kind} {statistics.median(mine) * 1e3:8.2f} ms {ratio:6.2f} x")
            sent = max(rank[elements, tensors]["sent"].get(name, 0.0) for rank in by_rank)
            print(f"  {name:10}  " + "   ".join(columns) + (f"   sent {sent:.2f} N" if sent else ""))
        limit = LIMITS.get(elements, {}).get(world_size)
        print(f"  memory added after the first call: {found['grown_kib'] / 1024:.1f} MiB; limit of auto: {limit}")
    if table:
        print(f"\n{world_size} ranks: what auto takes")
        for (elements, tensors), found in by_rank[0].items():
            line = ""
            for name in ("rvh", "gram"):
                wall_s, cpu_s = (statistics.median(column) for column in zip(*found["times"][name], strict=True))
                line += f"   {name} wall {wall_s * 1e3:8.2f} ms, CPU {cpu_s * 1e3:8.2f} ms"
            print(f"  {elements:>10} elements in {tensors:>6} tensors{line}   auto: {found['chosen']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--elements", type=int, nargs="*", default=[100_000, 25_000_000], help="none: --table alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="rvh beside gram in more shapes, and what auto takes")
    options = parser.parse_args()
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn(rank_main, (world_size, folder, options), nprocs=world_size)  # type: ignore[no-untyped-call]  # torch's
            by_rank = [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(world_size)]
            report(world_size, by_rank, table=options.table)


if __name__ == "__main__":
    main()
