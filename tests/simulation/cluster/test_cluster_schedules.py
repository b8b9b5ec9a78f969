"""Several controllers on etcd, and one on a disk, under random faults: every invariant holds, our faults are found.

`pytest tests/simulation/cluster --seed N` replays one schedule with its trace; so does `python -m simulation.cluster
--seed N` in tests/. `--cluster-schedules N` lives through more of them.
"""

from __future__ import annotations

import pytest
from simulation.budget import hold_every, hold_one
from simulation.cluster.mutations import MUTATIONS
from simulation.cluster.world import run, trace
from simulation.mutations import broken

_BLOCK = 50


@pytest.mark.timeout(1800)
def test_several_controllers_keep_their_word_in_every_schedule(pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("--seed", None)
    if seed is not None:
        hold_one(trace, seed)
    else:
        hold_every(run, pytestconfig.getoption("--cluster-schedules", 1000), _BLOCK)


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_broken_controller_is_found_out(name: str) -> None:
    mutation = MUTATIONS[name]
    with broken(mutation):
        found = any(run(seed) is not None for seed in range(mutation.seeds))
    assert found, f"{name}: {mutation.what}, and no invariant breaks in {mutation.seeds} schedules"


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_gives_the_same_schedule_of_controllers_again(seed: int) -> None:
    first, again = trace(seed), trace(seed)
    assert first == again
    assert first[0], f"seed {seed}: nothing happened"
