"""What differs between schedules beside their faults: sizes, speeds, limits. All of it follows from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from stretto_controller.core.limits import Limits

# The long waits of the defaults, shortened so that more happens in a schedule. Every tenth schedule has the defaults.
SHORT = replace(
    Limits(),
    recovery_grace_s=4.0,
    apart_s=4.0,
    waiting_limit_s=25.0,
    leave_limit_s=6.0,
    late_limit_s=6.0,
    hang_limit_s=15.0,
    end_limit_s=15.0,
    stop_limit_s=12.0,
)
# Chains of faults (patterns.py), how often each is chosen, and the fewest nodes that it makes sense with.
CHAINS = {
    "": (7, 1),
    "unseen_generation": (4, 1),
    "lone_step": (4, 4),
    "source_dies": (2, 2),
    "crash_in_decision": (3, 1),
    "answered_twice": (2, 2),
    "outage": (2, 2),
    "half_a_node": (1, 2),
    "last_holders_go": (2, 1),
    "apart_for_good": (1, 3),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """One schedule's circumstances. Times in seconds."""

    limits: Limits
    tick_interval_s: float
    min_nodes: int
    max_nodes: int
    # Worker processes of each node that is there from the start.
    slots: tuple[int, ...]
    # How often an agent may restart its workers for failures of their own; -1: always.
    restarts: int
    target_step: int
    compute_s: float
    transfer_s: float
    start_up_s: float
    # How often rank 0 wants a checkpoint, per step.
    save_rate: float
    delay_s: float
    # Messages of which so many are late by up to `late_s`.
    late_share: float
    late_s: float
    # Faults come until then; then everything heals.
    active_s: float
    faults: int
    # Which chain of faults it has beside those; "": none.
    chain: str

    @classmethod
    def of(cls, rng: random.Random) -> Setup:
        chain = rng.choices(list(CHAINS), [often for often, _ in CHAINS.values()])[0]
        fewest = CHAINS[chain][1]
        limits = Limits() if rng.random() < 0.1 else SHORT
        max_nodes = max(fewest, rng.choice((1, 2, 2, 3, 3, 3, 4)))
        min_nodes = rng.randint(1, min(2, max_nodes))
        slots = 2 if rng.random() < 0.25 or chain == "half_a_node" else 1
        nodes = max(min_nodes, fewest, max_nodes + rng.choice((-1, 0, 0, 0, 1)))
        active_s = rng.uniform(2.0, 8.0)
        compute_s = rng.choice((0.1, 0.2, 0.3, 0.5))
        if chain == "unseen_generation":
            # Until those out of sight count as lost, and others have begun without them.
            active_s += unseen_s(limits)
            compute_s = max(0.3, compute_s)
        return cls(
            limits=limits,
            tick_interval_s=rng.choice((0.5, 0.9)),
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            slots=tuple(slots if rng.random() < 0.8 else 1 for _ in range(nodes)),
            restarts=rng.choice((-1, -1, -1, 3, 1)),
            target_step=max(4, int(active_s / compute_s * rng.uniform(0.4, 1.2))),
            compute_s=compute_s,
            transfer_s=rng.choice((0.002, 0.05, 0.3)),
            start_up_s=rng.choice((0.2, 0.5, 1.5)),
            save_rate=rng.choice((0.0, 0.05, 0.2)),
            delay_s=rng.choice((0.0005, 0.002, 0.01)),
            late_share=rng.choice((0.0, 0.05, 0.2)),
            late_s=rng.choice((0.05, 0.3, 1.0)),
            active_s=active_s,
            faults=rng.choice((2, 3, 3, 4, 5, 6, 8)) if not chain else rng.choice((1, 2, 2, 3, 4, 5)),
            chain=chain,
        )


def unseen_s(limits: Limits) -> float:
    """After so long out of sight whole generations count as lost."""
    return limits.missed_heartbeats * limits.heartbeat_interval_s + limits.recovery_grace_s
