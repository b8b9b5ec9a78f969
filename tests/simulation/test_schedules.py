"""The protocol under random faults: every invariant holds in every schedule, and each fault of ours is found.

`pytest tests/simulation --seed N` replays one schedule with its trace; so does `python -m simulation --seed N` in
tests/. `--schedules N` lives through more of them.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from simulation.mutations import MUTATIONS, broken
from simulation.world import Failure, run, trace

_BLOCK = 250
_PROCESSES = 2


def _live_through(first: int) -> tuple[list[Failure], float]:
    """A block of schedules: those that failed, and the seconds of CPU it took. Each is small: collecting garbage once a
    block is faster, and enough.
    """
    began_s = time.process_time()
    gc.disable()
    failures = [failure for seed in range(first, first + _BLOCK) if (failure := run(seed)) is not None]
    gc.enable()
    gc.collect()
    return failures, time.process_time() - began_s


@pytest.mark.timeout(1800)
def test_invariants_hold_in_every_schedule(pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("--seed", None)
    if seed is not None:
        lines, failure = trace(seed)
        print("\n".join(lines))
        assert failure is None, f"seed {seed}: {failure.message}"
        return
    firsts = range(0, pytestconfig.getoption("--schedules", 10_000), _BLOCK)
    with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        blocks = list(pool.map(_live_through, firsts))
    failures = [failure for block, _ in blocks for failure in block]
    cost_s = sum(block_s for _, block_s in blocks)
    print(
        f"{len(firsts) * _BLOCK} schedules, {cost_s:.0f} s of CPU: {1000 * cost_s / len(firsts) / _BLOCK:.1f} ms each"
    )
    told = "\n".join(f"seed {failure.seed}: {failure.message}" for failure in failures[:20])
    assert not failures, f"{len(failures)} of {len(firsts) * _BLOCK} schedules broke an invariant:\n{told}"


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_system_is_found_out(name: str) -> None:
    mutation = MUTATIONS[name]
    with broken(mutation):
        found = any(run(seed) is not None for seed in range(mutation.seeds))
    assert found, f"{name}: {mutation.what}, and no invariant breaks in {mutation.seeds} schedules"


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_gives_the_same_schedule_again(seed: int) -> None:
    first, again = trace(seed), trace(seed)
    assert first == again
    assert first[0], f"seed {seed}: nothing happened"
