"""A trace: which jobs arrive when, how they behave, and which nodes there are. Read from YAML.

docs/goodput.md describes the format; examples/traces/ has one of 160 jobs on 64 nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from stretto_controller.core.goodput.step_time import Shape


@dataclass(frozen=True, slots=True)
class TracedJob:
    """One job as it really is; a policy sees of it what the controller would measure. One node has one worker."""

    name: str
    arrives_s: float
    # What a step costs: per micro-batch, per sample, for any exchange between workers, for each worker beyond two.
    overhead_s: float
    sample_s: float
    exchange_s: float
    hop_s: float
    base_batch_size: int
    batch_size: int
    # The gradient's variance over its squared norm, at tau = 0 and at the target; geometric between.
    noise_begin: float
    noise_end: float
    target_tau: float
    # What its owner asks for where sizes are fixed.
    fixed_nodes: int
    min_nodes: int = 1
    max_nodes: int = 16
    # Training stands still for so long at each change of its nodes.
    pause_s: float = 30.0
    weight: float = 1.0
    priority: int = 0

    def step_s(self, nodes: int) -> float:
        compute = self.overhead_s + self.sample_s * self.batch_size
        return compute + (nodes > 1) * self.exchange_s + max(nodes - 2, 0) * self.hop_s

    def shape(self, nodes: int) -> Shape:
        return Shape(nodes, float(self.batch_size))

    def noise(self, tau: float) -> float:
        share = min(1.0, tau / self.target_tau)
        return self.noise_begin * math.exp(share * math.log(self.noise_end / self.noise_begin))

    def rate(self, nodes: int, tau: float) -> float:
        """d(tau)/dt as it really is."""
        if nodes == 0:
            return 0.0
        scale, noise = nodes * self.batch_size / self.base_batch_size, self.noise(tau)
        return (noise + 1) / (noise / scale + 1) / self.step_s(nodes)

    @property
    def alone_s(self) -> float:
        """How long one node takes. At its scale the gain hardly depends on the noise; it is taken half way."""
        return self.target_tau / self.rate(1, self.target_tau / 2)


@dataclass(frozen=True, slots=True)
class Capacity:
    """From this moment on there are so many nodes: spot nodes that go and come."""

    at_s: float
    nodes: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A node breaks and is back after repair_s. Who holds the node of this number, counted over all jobs, pauses."""

    at_s: float
    node: int
    repair_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    nodes: int
    jobs: tuple[TracedJob, ...]
    capacity: tuple[Capacity, ...] = ()
    failures: tuple[Failure, ...] = ()

    def nodes_at(self, now_s: float) -> int:
        """How many nodes there are, without those that are being repaired."""
        known = [change.nodes for change in self.capacity if change.at_s <= now_s]
        broken = sum(1 for f in self.failures if f.at_s <= now_s < f.at_s + f.repair_s)
        return max(0, (known[-1] if known else self.nodes) - broken)


def read_trace(path: Path) -> Trace:
    """Raises ValueError, saying where and what is allowed, for a file that is no trace."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the trace {path}: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("jobs"), list):
        raise ValueError(f"{path} is no trace: it must be a table with `nodes` and a list `jobs`")
    unknown = table.keys() - {"nodes", "jobs", "capacity", "failures"}
    if unknown:
        raise ValueError(f"{path} has the unknown entries {', '.join(sorted(map(str, unknown)))}")
    jobs = tuple(_entry(TracedJob, row, f"{path}: job {i}") for i, row in enumerate(table["jobs"], 1))
    trace = Trace(
        nodes=_number(table.get("nodes"), int, f"{path}: nodes"),
        jobs=tuple(sorted(jobs, key=lambda job: job.arrives_s)),
        capacity=tuple(
            _entry(Capacity, row, f"{path}: capacity {i}") for i, row in enumerate(table.get("capacity", []))
        ),
        failures=tuple(_entry(Failure, row, f"{path}: failure {i}") for i, row in enumerate(table.get("failures", []))),
    )
    _check(trace, path)
    return trace


def _check(trace: Trace, path: Path) -> None:
    if trace.nodes < 1 or not trace.jobs:
        raise ValueError(f"{path} has {trace.nodes} nodes and {len(trace.jobs)} jobs; it needs at least one of each")
    if len({job.name for job in trace.jobs}) < len(trace.jobs):
        raise ValueError(f"{path} has two jobs of one name")
    for job in trace.jobs:
        positive = ("sample_s", "base_batch_size", "batch_size", "noise_begin", "noise_end", "target_tau", "weight")
        for name in positive:
            if getattr(job, name) <= 0:
                raise ValueError(f"{path}: {name} of {job.name} is {getattr(job, name)}; it must be above 0")
        if not 1 <= job.min_nodes <= job.max_nodes or not 1 <= job.fixed_nodes <= trace.nodes:
            raise ValueError(
                f"{path}: {job.name} has min_nodes {job.min_nodes}, max_nodes {job.max_nodes}, fixed_nodes "
                f"{job.fixed_nodes}; give 1 <= min_nodes <= max_nodes and 1 <= fixed_nodes <= {trace.nodes}"
            )


def _entry(kind: Any, row: object, where: str) -> Any:
    """One dataclass of numbers and texts from a table."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r}; it must be a table")
    known = {field.name: field for field in fields(kind)}
    unknown = row.keys() - known.keys()
    missing = [n for n, field in known.items() if field.default is MISSING and n not in row]
    if unknown or missing:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown {', '.join(map(str, unknown))}"
        raise ValueError(f"{where} {wrong}; known are {', '.join(known)}")
    types = {"str": str, "int": int, "float": float}
    return kind(
        **{name: _number(value, types[str(known[name].type)], f"{where}, {name}") for name, value in row.items()}
    )


def _number(value: object, kind: type, where: str) -> Any:
    if kind is str:
        return str(value)
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 <= value < math.inf:
        raise ValueError(f"{where} is {value!r}; it must be {'a whole number' if kind is int else 'a number'} from 0")
    return kind(value)
