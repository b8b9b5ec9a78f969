"""Replays one schedule of several controllers, and prints what happened, line by line.

    cd tests && ../.venv/bin/python -m simulation.cluster --seed 1234

`--mutation NAME` breaks the system on purpose first (simulation/cluster/mutations.py); without `--seed` it looks for a
seed that shows it. `--statistics 1000` lives through that many and says what they contain. `--from 5000` begins there.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

from simulation.cluster.mutations import MUTATIONS
from simulation.cluster.world import World, run, trace
from simulation.replay import Simulation, replay


def told(seeds: range) -> list[str]:
    """Live through these schedules; lines for a person."""
    kinds: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    failures: list[str] = []
    began_s = time.process_time()

    def count(world: World) -> None:
        worlds.append(world)

    for seed in seeds:
        worlds: list[World] = []
        failure = run(seed, count)
        world = worlds[0]
        kinds += world.faults.counts
        totals["terms"] += world.invariants.terms
        totals["writes"] += world.invariants.writes
        totals["generations"] += len(world.invariants.generations)
        totals["answers to people"] += sum(person.answers for person in world.people)
        if failure is not None:
            failures.append(f"seed {seed}: {failure.message}")
    cost_s = time.process_time() - began_s
    return [
        f"{len(seeds)} schedules, {len(failures)} of them broken; {1000 * cost_s / len(seeds):.1f} ms of CPU each",
        *failures[:20],
        "per schedule:",
        *(f"  {what:32} {number / len(seeds):6.2f}" for what, number in totals.most_common()),
        "faults of each kind, per schedule:",
        *(f"  {kind:32} {number / len(seeds):6.2f}" for kind, number in kinds.most_common()),
    ]


assert __doc__ is not None
sys.exit(replay(Simulation("python -m simulation.cluster", __doc__.splitlines()[0], MUTATIONS, run, trace, told)))
