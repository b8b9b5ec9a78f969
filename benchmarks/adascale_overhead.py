"""What AdaScale costs beside plain DDP, as paired ratios of step times within one launch.

    python benchmarks/adascale_overhead.py --model transformer --rounds 200

Two gloo ranks on this machine. Every round runs each variant once, in rotated order, so that each ratio compares
neighbours in time; "ddp again" is a second plain DDP, whose ratio is the noise. FairScale's AdaScale runs too where
it can be imported. Printed: median paired ratios of wall and of CPU time with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from stretto import AdaScale
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

BASELINE = "ddp"
BATCHES = 8  # made before the clock runs


class Transformer(nn.Module):
    """About 25M parameters: 6 layers of width 512 over a vocabulary of 12,000."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(12_000, 512)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(512, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embedding(tokens)).mean(1))
        return out


def small_cnn() -> nn.Module:
    """About 0.3M parameters over 32 x 32 images."""
    widths = [3, 32, 32, 64, 64, 128, 128]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, stride=1 + index % 2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64))


def make_batches(model: str, rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    targets = torch.randint(0, 64, (BATCHES, size), generator=generator)
    if model == "transformer":
        inputs = torch.randint(0, 12_000, (BATCHES, size, 32), generator=generator)
    else:
        inputs = torch.randn(BATCHES, size, 3, 32, 32, generator=generator)
    return list(zip(inputs, targets, strict=True))


class Variant:
    """One way to train the model; owns its copy of it."""

    def __init__(self, name: str, model: str, size: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = DistributedDataParallel(Transformer() if model == "transformer" else small_cnn())
        inner = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.optimizer: Any = inner
        if name == "stretto":
            self.optimizer = AdaScale(inner, self.model, base_batch_size=size)
        elif name == "fairscale":
            from fairscale.optim import AdaScale as FairScale  # type: ignore[import-not-found]  # optional peer

            self.optimizer = FairScale(inner)

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Train on one batch and return wall and CPU seconds, from zero_grad to step."""
        dist.barrier()
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - wall_s, time.process_time() - cpu_s


def interval(ratios: list[float], rng: random.Random) -> list[float]:
    """95 % bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return [round(medians[25], 4), round(medians[974], 4)]


def report(times: dict[str, list[tuple[float, float]]], about: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(0)
    result = dict(about)
    for kind, column in (("wall", 0), ("cpu", 1)):
        baseline = [pair[column] for pair in times[BASELINE]]
        for name, pairs in times.items():
            ratios = [pair[column] / base for pair, base in zip(pairs, baseline, strict=True)]
            entry = result.setdefault(name, {})
            entry[f"{kind}_ms"] = round(1e3 * statistics.median(pair[column] for pair in pairs), 2)
            if name != BASELINE:
                entry[f"{kind}_ratio"] = round(statistics.median(ratios), 4)
                entry[f"{kind}_ratio_95"] = interval(ratios, rng)
    return result


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Entry of a rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    names = [BASELINE, "ddp again", "stretto"]
    if importlib.util.find_spec("fairscale"):
        names.append("fairscale")
    variants = [Variant(name, options.model, options.batch) for name in names]
    batches = make_batches(options.model, rank, options.batch)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_number in range(options.warmup + options.rounds):
        shift = round_number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            taken = variant.step(batches[round_number % BATCHES])
            if round_number >= options.warmup:
                times[variant.name].append(taken)
    if rank == 0:
        parameters = sum(p.numel() for p in variants[0].model.parameters())
        about = {
            "model": options.model,
            "parameters": parameters,
            "ranks": options.ranks,
            "rounds": options.rounds,
            "torch": torch.__version__,
            "load": os.getloadavg(),
        }
        print(json.dumps(report(times, about), indent=1))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["transformer", "cnn"], default="transformer")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="samples per rank")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    start: Any = spawn  # untyped in torch
    with tempfile.TemporaryDirectory() as folder:
        start(measure, (folder, options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
