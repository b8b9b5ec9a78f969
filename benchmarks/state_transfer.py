"""What giving a live worker's state to the others costs, as paired ratios beside one broadcast of as many bytes.

    python benchmarks/state_transfer.py --ranks 2 --rounds 10

Ranks of one `stretto.group` on this machine: 25M float32 parameters and their momentum, about 200 MB. Every round
runs each variant once, in rotated order:
- "broadcast": torch's broadcast of one flat tensor into memory that is there already: the link;
- "fresh": the same into memory that was never touched, which is where a copy that may be refused has to go;
- "transfer": `synchronise`, whose copy is fresh memory too, with both sides' checksums and their comparison.
Printed: medians in GB/s, and the transfer's median paired ratio of speeds to each broadcast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from stretto.group import Group, GroupLife, Member, Plan
from stretto.transfer import TransferSettings, fingerprint, synchronise
from torch import nn


def make_state(options: argparse.Namespace) -> dict[str, Any]:
    """A transformer's parameters and momentum, or as many in a few large tensors."""
    if options.model == "flat":
        model: nn.Module = nn.Sequential(*(nn.Linear(2500, 2500) for _ in range(4)))
    else:
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, norm_first=True)
        layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        model = nn.ModuleDict({"embedding": nn.Embedding(12_000, 512), "layers": layers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}


class Rank:
    """One process: the variants, each of which returns what it received."""

    def __init__(self, group: Group, options: argparse.Namespace) -> None:
        self._group = group
        self._settings = TransferSettings(chunk_bytes=options.chunk_mib << 20, in_flight=options.in_flight)
        self._state = make_state(options)
        tensors = [*self._state["model"].values()]
        tensors += [each["momentum_buffer"] for each in self._state["optimizer"]["state"].values()]
        self.size_bytes = sum(each.numel() * each.element_size() for each in tensors)
        self._flat = torch.zeros(self.size_bytes, dtype=torch.uint8)
        self.variants: dict[str, Callable[[], Any]] = {
            "broadcast": lambda: self._broadcast(self._flat),
            "fresh": lambda: self._broadcast(self._flat if group.rank == 0 else torch.empty_like(self._flat)),
            "transfer": lambda: synchronise(group, self._state, 0, settings=self._settings),
        }

    def measure(self, name: str) -> float:
        """Seconds from when all ranks are ready until all are done."""
        self._group.wait(self._group.barrier())
        began_s = time.perf_counter()
        received = self.variants[name]()
        self._group.wait(self._group.barrier())
        took_s = time.perf_counter() - began_s
        del received
        return took_s

    def check(self) -> bool:
        """Whether a transfer brings the source's bits; and what the fingerprint costs."""
        received = synchronise(self._group, self._state, 0, settings=self._settings)
        return received is None or fingerprint(received) == fingerprint(self._state)

    def fingerprint_s(self) -> float:
        began_s = time.perf_counter()
        fingerprint(self._state)
        return time.perf_counter() - began_s

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._group.wait(self._group.broadcast(tensor, 0))


def run(pipe: Connection, rank: int, options: argparse.Namespace) -> None:
    """Entry of a rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    life = GroupLife("benchmark", "127.0.0.1")
    ports = life.serve()
    pipe.send((ports.store, ports.preflight))
    members = tuple(Member("127.0.0.1", *each) for each in pipe.recv())
    group = life.build(Plan(1, rank, members), cancelled=lambda: False)
    this = Rank(group, options)
    assert this.check(), "the copy differs"
    times: dict[str, list[float]] = {name: [] for name in this.variants}
    names = list(times)
    for round_number in range(options.rounds + 1):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            took_s = this.measure(name)
            if round_number:  # the first warms up
                times[name].append(took_s)
    print_s = statistics.median(this.fingerprint_s() for _ in range(5))
    if rank == 0:
        report(times, this.size_bytes, print_s, options)
    group.wait(group.barrier())
    group.abandon()
    life.close(10.0)


def report(times: dict[str, list[float]], size: int, print_s: float, options: argparse.Namespace) -> None:
    result: dict[str, Any] = vars(options) | {"megabytes": round(size / 1e6), "torch": torch.__version__}
    for name, seconds in times.items():
        result[f"{name}_gb_per_s"] = round(size / statistics.median(seconds) / 1e9, 2)
    for name in ("broadcast", "fresh"):
        ratios = [other / ours for other, ours in zip(times[name], times["transfer"], strict=True)]
        result[f"transfer_to_{name}_speed"] = round(statistics.median(ratios), 2)
    result["fingerprint_gb_per_s"] = round(size / print_s / 1e9, 2)
    print(json.dumps(result | {"load": os.getloadavg()}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", choices=["transformer", "flat"], default="transformer")
    parser.add_argument("--chunk-mib", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=4)
    options = parser.parse_args()
    context = get_context("spawn")
    pipes, processes = [], []
    for rank in range(options.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs, rank, options), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    members = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(members)
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"a rank ended with {process.exitcode}"


if __name__ == "__main__":
    main()
