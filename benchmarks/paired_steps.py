"""What `adascale_overhead.py` keeps of its rounds, and says of them: ratios to plain DDP within each round."""

from __future__ import annotations

import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import torch

BASELINE = "ddp"
CLAIM = 1.03
PARAMETER_BYTES = 4


class Samples:
    """Per variant: (wall, CPU or GPU) seconds of each round, and the rise of memory in warm-up steps."""

    def __init__(self, names: list[str]) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self.peak_bytes: dict[str, list[int]] = {name: [] for name in names}
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
                self.peak_bytes[name][:0] = kept["peak_bytes"][name]
            self.loads[:0] = kept["loads"]
        left = {"about": about, "times": self.times, "peak_bytes": self.peak_bytes, "loads": self.loads}
        path.write_text(json.dumps(left))


class PeakMemory:
    """How far this process's memory rises from here: resident memory, or the allocator's on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")  # sets the highest mark back
        self._before = _status_bytes("VmRSS")

    def risen(self) -> int:
        highest = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _status_bytes("VmHWM")
        return max(highest - self._before, 0)


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
    if samples.peak_bytes[BASELINE]:
        size_bytes = about["parameters"] * PARAMETER_BYTES
        plain = statistics.median(samples.peak_bytes[BASELINE])
        for name, rises in samples.peak_bytes.items():
            beside = statistics.median(rises) - plain
            result[name]["step_memory_mib"] = round(statistics.median(rises) / 2**20, 2)
            result[name]["memory_beside_ddp_percent_of_parameters"] = round(100 * beside / size_bytes, 2)
    for kind in kinds:
        low, high = result["ddp again"][f"{kind}_ratio_95"]
        result[f"{kind}_noise_is_narrower_than_the_claim"] = high - low < CLAIM - 1
    return result


def _interval(ratios: list[float], rng: random.Random) -> list[float]:
    """95 % bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return [round(medians[25], 4), round(medians[974], 4)]


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
