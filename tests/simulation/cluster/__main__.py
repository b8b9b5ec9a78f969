"""Replays one schedule of several controllers, and prints what happened, line by line.

    cd tests && ../.venv/bin/python -m simulation.cluster --seed 1234

`--mutation NAME` breaks the system on purpose first (simulation/cluster/mutations.py); without `--seed` it looks for a
seed that shows it. `--statistics 1000` lives through that many and says what they contain. `--from 5000` begins there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from simulation.cluster.mutations import MUTATIONS
from simulation.cluster.world import World, run, trace
from simulation.mutations import broken

SEEDS_LIMIT = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="which schedule; without it, the first that fails")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed, where several are tried")
    parser.add_argument("--statistics", type=int, metavar="N", help="say what N schedules contain")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="break the system in this way first")
    arguments = parser.parse_args()
    first = arguments.first
    if arguments.statistics:
        print("\n".join(told(range(first, first + arguments.statistics))))
        return 0
    with broken(MUTATIONS[arguments.mutation] if arguments.mutation else None):
        seed = arguments.seed
        if seed is None:
            seed = next((seed for seed in range(first, first + SEEDS_LIMIT) if run(seed) is not None), None)
        if seed is None:
            print(f"none of {SEEDS_LIMIT} schedules fails")
            return 0
        lines, failure = trace(seed)
    print("\n".join(lines))
    print(f"seed {seed}: {failure.message if failure else 'every invariant holds'}")
    return 1 if failure else 0


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


sys.exit(main())
