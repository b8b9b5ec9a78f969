"""Replays one schedule of the simulation, and prints what happened, line by line.

    cd tests && ../.venv/bin/python -m simulation --seed 1234

`pytest tests/simulation --seed 1234` replays it, too, and shows the trace if an invariant breaks. `--mutation NAME`
breaks the system on purpose first (simulation/mutations.py); without `--seed` it looks for a seed that shows it.
`--statistics 1000` lives through that many and says what they contain. `--from 200000` begins there.
"""

from __future__ import annotations

import argparse
import sys

from simulation.mutations import MUTATIONS, broken
from simulation.schedule_statistics import told
from simulation.world import run, trace

SEEDS_LIMIT = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__.splitlines()[0])
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


sys.exit(main())
