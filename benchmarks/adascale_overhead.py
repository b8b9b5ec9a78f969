r"""What AdaScale costs beside plain DDP, as paired ratios of step times within one launch.

    python benchmarks/adascale_overhead.py --model transformer --rounds 200
    pip install --target PEERS --no-deps fairscale==0.4.13 adaptdl==0.2.11 portpicker autograd requests urllib3 idna \
        certifi charset-normalizer semver redis "setuptools<81"
    python benchmarks/adascale_overhead.py --model cnn --peers PEERS
    python benchmarks/adascale_overhead.py --device cuda --model large       # NCCL, one rank per GPU, CUDA events

Two gloo ranks on this machine, unless told otherwise. Every round runs each variant once, in rotated order, so that
each ratio compares neighbours in time; "ddp again" is a second plain DDP, whose ratio is the noise: its interval has to
be narrower than what is claimed. "stretto k=8" measures gradients in every eighth step only, after 100. Printed: median
paired ratios of wall and of CPU time (of the GPU's, with --device cuda) with 95 % bootstrap intervals; and the
memory that one step allocates, beside plain DDP's.

Where the machine is quiet for minutes only: `--limit-s 240 --samples FILE`, several times. Each run adds its rounds to
the file and reports on all that are in it; rounds are paired within themselves, so those of several runs can be pooled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from paired_steps import BASELINE, Samples, bytes_made, reduce_at_once, report
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from stretto.ddp_norms import AllReduce
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

OURS = ("stretto", "stretto k=8")
BATCHES = 8  # made before the clock runs

Batch = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Over a vocabulary of 12,000: 25M parameters with 6 layers of width 512, 314M with 24 of width 1,024."""

    def __init__(self, layers: int = 6, width: int = 512) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(12_000, width)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 64)

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


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": Transformer,
    "large": lambda: Transformer(24, 1024),
    "cnn": small_cnn,
}


def make_batches(model: str, rank: int, size: int, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    targets = torch.randint(0, 64, (BATCHES, size), generator=generator)
    if model == "cnn":
        inputs = torch.randn(BATCHES, size, 3, 32, 32, generator=generator)
    else:
        inputs = torch.randint(0, 12_000, (BATCHES, size, 32), generator=generator)
    return list(zip(inputs.to(device), targets.to(device), strict=True))


class Variant:
    """One way to train the model; owns its copy of it."""

    def __init__(self, name: str, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.device = name, device
        module = MODELS[options.model]().to(device)
        self.feed: Iterator[Any] | None = None  # of a peer that steps inside a loader of its own
        ids = [device.index] if device.type == "cuda" else None
        inner = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        self.model: nn.Module = module if name == "adaptdl" else DistributedDataParallel(module, device_ids=ids)
        self.optimizer: Any = inner
        if name in OURS:
            settings = AdaScaleSettings(statistics_interval=8 if name != "stretto" else 1)
            self.optimizer = AdaScale(inner, self.model, base_batch_size=options.batch, settings=settings)
        elif name == "fairscale":
            from fairscale.optim import AdaScale as FairScale  # type: ignore[import-not-found]  # optional peer

            self.optimizer = FairScale(inner)
        elif name == "adaptdl":
            self.model, self.feed = adaptdl_loop(module, inner, options.batch)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Train on one batch and return seconds, from zero_grad to step: wall and CPU, or wall and GPU."""
        if self.feed is not None:
            next(self.feed)
        dist.barrier()
        cuda = self.device.type == "cuda"
        event: Any = torch.cuda.Event  # untyped in torch
        events = [event(enable_timing=True) for _ in range(2)] if cuda else []
        if cuda:
            torch.cuda.synchronize()
            events[0].record()
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        if cuda:
            events[1].record()
            torch.cuda.synchronize()
            return time.perf_counter() - wall_s, events[0].elapsed_time(events[1]) / 1e3
        return time.perf_counter() - wall_s, time.process_time() - cpu_s

    def step_bytes(self, batches: list[Batch]) -> int:
        """What a step allocates once buffers and optimizer state are there."""
        counted_here = self.name in OURS and self.device.type == "cpu"
        if counted_here:
            self.bind(reduce_at_once)
        for batch in batches[:2]:
            self.step(batch)
        made = bytes_made(self.device, lambda: self.step(batches[2]))
        if counted_here:
            self.bind(None)
        return made

    def bind(self, all_reduce: AllReduce | None) -> None:
        self.model = DistributedDataParallel(self.model.module)
        self.optimizer.rebind(self.model, all_reduce=all_reduce)


def adaptdl_loop(module: nn.Module, inner: torch.optim.Optimizer, size: int) -> tuple[nn.Module, Iterator[Any]]:
    """AdaptDL's model, and the loader of its own that it has to be stepped in; the loader's data is not used."""
    import adaptdl.torch as adl  # type: ignore[import-not-found]  # optional peer

    length = size * dist.get_world_size() * 400
    data = torch.utils.data.TensorDataset(torch.zeros(length, 1))
    loader = adl.AdaptiveDataLoader(data, batch_size=size * dist.get_world_size(), drop_last=True)
    wrapped: nn.Module = adl.AdaptiveDataParallel(module, inner)

    def steps() -> Iterator[Any]:
        for _ in adl.remaining_epochs_until(1000):
            yield from loader

    return wrapped, steps()


def join(rank: int, folder: str, options: argparse.Namespace, names: list[str]) -> torch.device:
    """Meet the other ranks; AdaptDL wants to make the group itself."""
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
        return torch.device("cuda", rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if "adaptdl" in names:
        os.environ.update(
            ADAPTDL_NUM_REPLICAS=str(options.ranks), ADAPTDL_REPLICA_RANK=str(rank), ADAPTDL_NUM_NODES="1"
        )
        import adaptdl.torch as adl

        adl.init_process_group("gloo", init_method=options.rendezvous, world_size=options.ranks, rank=rank)
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    return torch.device("cpu")


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Entry of a rank."""
    if options.peers:
        sys.path.append(options.peers)
    names = [name for name in (BASELINE, "ddp again", *OURS, *peers_in(options.peers)) if name not in options.without]
    device = join(rank, folder, options, names)
    variants = [Variant(name, options, device) for name in names]
    batches = make_batches(options.model, rank, options.batch, device)
    samples = Samples(names)
    for variant in variants:
        samples.step_bytes[variant.name] = variant.step_bytes(batches)
    started_s = time.monotonic()
    for round_number in range(options.warmup + options.rounds):
        late = torch.tensor([float(time.monotonic() - started_s > options.limit_s)], device=device)
        dist.broadcast(late, 0)
        if late.item():
            break
        shift = round_number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            taken = variant.step(batches[round_number % BATCHES])
            if round_number >= options.warmup:
                samples.times[variant.name].append(taken)
    if rank == 0:
        about = {
            "model": options.model,
            "parameters": sum(p.numel() for p in variants[0].model.parameters()),
            "ranks": options.ranks,
            "batch_per_rank": options.batch,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        if options.samples:
            samples.pool(options.samples, about)
        kinds = ["wall", "gpu" if device.type == "cuda" else "cpu"]
        print(json.dumps(report(samples, about, kinds), indent=1), flush=True)
    dist.barrier()
    os._exit(0)  # AdaptDL's threads would stay


def peers_in(folder: str | None) -> list[str]:
    """The peers that were installed into `folder`."""
    return [name for name in ("fairscale", "adaptdl") if folder and os.path.isdir(os.path.join(folder, name))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="transformer")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=5, help="rounds; over 100 to see what k=8 saves")
    parser.add_argument("--limit-s", type=float, default=1e9, help="seconds after which no round begins")
    parser.add_argument("--samples", help="a file of rounds to add to")
    parser.add_argument("--without", nargs="*", default=[], help="variants to leave out, such as 'stretto k=8'")
    parser.add_argument("--batch", type=int, default=16, help="samples per rank")
    parser.add_argument("--ranks", type=int, help="default: 2, or the number of GPUs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peers", help="a folder with fairscale and adaptdl in it")
    options = parser.parse_args()
    options.ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    start: Any = spawn  # untyped in torch
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:  # AdaptDL takes nothing but an address
            probe.bind(("127.0.0.1", 0))
            options.rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        start(measure, (folder, options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
