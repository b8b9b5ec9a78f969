"""What schedules contain: how many generations, steps and faults of each kind, and what they cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from simulation.ledger import Broken
from simulation.world import World


def told(seeds: Sequence[int]) -> list[str]:
    """Live through these schedules; lines for a person."""
    kinds: Counter[str] = Counter()
    chains: Counter[str] = Counter()
    faults, generations, steps, seconds = [], [], [], []
    failed = 0
    began_s = time.process_time()
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except Broken:
            failed += 1
        kinds += world.faults.counts
        chains[world.setup.chain or "none"] += 1
        faults.append(world.faults.counts.total())
        generations.append(world.invariants.generations)
        steps.append(world.invariants.steps)
        seconds.append(world.scheduler.now_s)
    count = len(seeds)
    cost_s = time.process_time() - began_s
    lines = [
        f"{count} schedules, {failed} of them broken; {1000 * cost_s / count:.1f} ms of CPU each",
        "per schedule                      mean    10%    50%    90%",
        _row("faults and requests", faults),
        _row("generations begun", generations),
        _row("steps committed", steps),
        _row("seconds on the fake clock", seconds),
        f"with at least 2 faults: {sum(n >= 2 for n in faults) / count:.0%}; "
        f"with at least 2 generations: {sum(n >= 2 for n in generations) / count:.0%}",
        "of each kind, per schedule:",
    ]
    lines += [f"  {kind:32} {number / count:5.2f}" for kind, number in kinds.most_common()]
    lines.append("chains of faults, share of schedules:")
    lines += [f"  {chain:32} {number / count:5.0%}" for chain, number in chains.most_common()]
    return lines


def _row(what: str, values: Iterable[float]) -> str:
    ordered = sorted(values)
    at = [ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9)]
    return f"  {what:30} {sum(ordered) / len(ordered):6.1f}" + "".join(f" {value:6.1f}" for value in at)
