"""The load generator against a small fleet: agents and workers join, die, and come back when the controller does."""

from __future__ import annotations

import pytest

from controller import load


@pytest.mark.e2e
async def test_a_small_fleet_lives_through_deaths_and_a_killed_controller() -> None:
    figures = await load(nodes=6, jobs=2, seconds=1.0, deaths=2, seed=1)
    assert figures.problems == []
    assert figures.deaths == 2
    assert figures.messages > 0
