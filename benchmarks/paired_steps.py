"""What `adascale_overhead.py` keeps of its rounds, and says of them: ratios to plain DDP within each round."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BASELINE = "ddp"
CLAIM = 1.03
PARAMETER_BYTES = 4


class Samples:
    """Per variant: (wall, CPU or GPU) seconds of each round, and the bytes that a step of each allocates."""

    def __init__(self, names: list[str]) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self.step_bytes: dict[str, int] = {}
        self.loads: list[float] = [os.getloadavg()[0]]

    def pool(self, file: str, about: dict[str, Any]) -> None:
        """Add what an earlier run of the same kind has left in `file`, and leave all of it there."""
        path = Path(file)
        kept = json.loads(path.read_text()) if path.exists() else None
        if kept is not None:
            if kept["about"] != about or kept["times"].keys() != self.times.keys():
                raise ValueError(
                    f"{file} has rounds of another kind: {kept['about']}, {list(kept['times'])}; name another file"
                )
            for name in self.times:
                self.times[name][:0] = [(wall, other) for wall, other in kept["times"][name]]
            self.loads[:0] = kept["loads"]
        left = {"about": about, "times": self.times, "loads": self.loads}
        path.write_text(json.dumps(left))


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Adds up the bytes of all tensors that operations of this thread make while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_memory_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _memory_of(tensor) not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return made


def reduce_at_once(tensor: Tensor, /, *, more: bool = False) -> torch.futures.Future[Any]:
    """An all-reduce for `AdaScale.rebind` that is over when it returns, so that what follows stays in this thread."""
    dist.all_reduce(tensor)
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result([tensor])
    return done


def bytes_made(device: torch.device, step: Callable[[], Any]) -> int:
    """What a step allocates: all of it on the CPU; on a GPU at most at a time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before_bytes: int = torch.cuda.memory_allocated()
        step()
        most_bytes: int = torch.cuda.max_memory_allocated()
        return most_bytes - before_bytes
    with Allocations() as allocations:
        step()
    made_bytes: int = allocations.bytes
    return made_bytes


def report(samples: Samples, about: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Medians, paired ratios to plain DDP with 95 % intervals, memory beside plain DDP's."""
    rng = random.Random(0)
    result = {**about, "rounds": len(samples.times[BASELINE]), "load_after_each_run": samples.loads}
    for column, kind in enumerate(kinds):
        baseline = [pair[column] for pair in samples.times[BASELINE]]
        for name, pairs in samples.times.items():
            ratios = [pair[column] / base for pair, base in zip(pairs, baseline, strict=True)]
            entry = result.setdefault(name, {})
            entry[f"{kind}_ms"] = round(1e3 * statistics.median(pair[column] for pair in pairs), 2)
            if name != BASELINE:
                entry[f"{kind}_ratio"] = round(statistics.median(ratios), 4)
                entry[f"{kind}_ratio_95"] = _interval(ratios, rng)
    size_bytes = about["parameters"] * PARAMETER_BYTES
    for name, made in samples.step_bytes.items():
        beside = made - samples.step_bytes[BASELINE]
        result[name]["step_allocates_mib"] = round(made / 2**20, 3)
        result[name]["beside_ddp_percent_of_parameters"] = round(100 * beside / size_bytes, 3)
    for kind in kinds:
        low, high = result["ddp again"][f"{kind}_ratio_95"]
        result[f"{kind}_noise_is_narrower_than_the_claim"] = high - low < CLAIM - 1
    return result


def _interval(ratios: list[float], rng: random.Random) -> list[float]:
    """95 % bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return [round(medians[25], 4), round(medians[974], 4)]


def _memory_of(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage().data_ptr()
    return address
