"""Many schedules of a simulation, on two processes: none may break an invariant."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Protocol

_PROCESSES = 2


class Failed(Protocol):
    """The schedule that broke an invariant, and how."""

    @property
    def seed(self) -> int: ...

    @property
    def message(self) -> str: ...


def hold_every(run: Callable[[int], Failed | None], schedules: int, block: int) -> None:
    """Live through that many, in blocks; fail with the seeds that broke, and print what they cost.

    run: one schedule, a function of a module.
    """
    firsts = range(0, schedules, block)
    with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        blocks = list(pool.map(partial(_live_through, run, block), firsts))
    failures = [failure for found, _ in blocks for failure in found]
    count, cost_s = len(firsts) * block, sum(block_s for _, block_s in blocks)
    print(f"{count} schedules, {cost_s:.0f} s of CPU: {1000 * cost_s / count:.1f} ms each")
    told = "\n".join(f"seed {failure.seed}: {failure.message}" for failure in failures[:20])
    assert not failures, f"{len(failures)} of {count} schedules broke an invariant:\n{told}"


def hold_one(trace: Callable[[int], tuple[Sequence[str], Failed | None]], seed: int) -> None:
    """Replay one schedule with its trace; fail if it breaks an invariant."""
    lines, failure = trace(seed)
    print("\n".join(lines))
    assert failure is None, f"seed {seed}: {failure.message}"


def _live_through(run: Callable[[int], Failed | None], block: int, first: int) -> tuple[list[Failed], float]:
    """A block of schedules: those that failed, and the seconds of CPU it took. Each is small: collecting garbage once a
    block is faster, and enough.
    """
    began_s = time.process_time()
    gc.disable()
    failures = [failure for seed in range(first, first + block) if (failure := run(seed)) is not None]
    gc.enable()
    gc.collect()
    return failures, time.process_time() - began_s
