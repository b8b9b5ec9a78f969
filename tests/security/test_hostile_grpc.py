"""Thousands of hostile messages, from a fixed seed: clear refusals, no fault, no growth, and nothing else touched."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from security.under_fire import UnderFire

INPUTS = 4000
SOAK_INPUTS = 30_000
# What the allocator keeps of the first attack is no growth; of so many more inputs nothing should stay.
GROWTH_MB = 25.0


async def _attacked(under_fire: UnderFire, inputs: int) -> None:
    await under_fire.attack(seed=1, inputs=inputs // 2)
    resident_mb = under_fire.resident_mb
    await under_fire.attack(seed=2, inputs=inputs // 2)
    under_fire.assert_well()
    under_fire.assert_no_secret_is_told()
    assert under_fire.resident_mb - resident_mb < GROWTH_MB
    limit_s = time.monotonic() + 60
    while (sessions := under_fire.series("stretto_controller_sessions")) != 2:
        assert time.monotonic() < limit_s, f"{sessions} streams are left, of two that should be"


async def test_hostile_messages_are_refused_and_hurt_nobody(tmp_path: Path) -> None:
    with UnderFire(tmp_path) as under_fire:
        await _attacked(under_fire, INPUTS)


@pytest.mark.soak
async def test_tens_of_thousands_of_hostile_messages_hurt_nobody(tmp_path: Path) -> None:
    with UnderFire(tmp_path) as under_fire:
        await _attacked(under_fire, SOAK_INPUTS)
        print(under_fire.outcomes)
