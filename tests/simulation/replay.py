"""The command that replays a schedule of a simulation, or looks for one that fails."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from simulation.budget import Failed
from simulation.mutations import Mutation, broken

SEEDS_LIMIT = 100_000


@dataclass(frozen=True)
class Simulation:
    """What there is to replay. told: what these schedules contain, in lines for a person."""

    program: str
    promise: str
    mutations: Mapping[str, Mutation]
    run: Callable[[int], Failed | None]
    trace: Callable[[int], tuple[Sequence[str], Failed | None]]
    told: Callable[[range], list[str]]


def replay(simulation: Simulation) -> int:
    """Do what the command line says; the exit status is 1 where an invariant breaks."""
    parser = argparse.ArgumentParser(prog=simulation.program, description=simulation.promise)
    parser.add_argument("--seed", type=int, help="which schedule; without it, the first that fails")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed, where several are tried")
    parser.add_argument("--statistics", type=int, metavar="N", help="say what N schedules contain")
    parser.add_argument("--mutation", choices=sorted(simulation.mutations), help="break the system in this way first")
    arguments = parser.parse_args()
    first = arguments.first
    if arguments.statistics:
        print("\n".join(simulation.told(range(first, first + arguments.statistics))))
        return 0
    with broken(simulation.mutations[arguments.mutation] if arguments.mutation else None):
        seed = arguments.seed
        if seed is None:
            tried = range(first, first + SEEDS_LIMIT)
            seed = next((seed for seed in tried if simulation.run(seed) is not None), None)
        if seed is None:
            print(f"none of {SEEDS_LIMIT} schedules fails")
            return 0
        lines, failure = simulation.trace(seed)
    print("\n".join(lines))
    print(f"seed {seed}: {failure.message if failure else 'every invariant holds'}")
    return 1 if failure else 0
