"""Options of the simulation's tests: `pytest tests/simulation --seed 1234`, `--schedules 50000`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay this schedule of the simulation, with its trace")
    parser.addoption("--cluster-schedules", type=int, default=1000, help="how many of several controllers")
    parser.addoption("--schedules", type=int, default=9000, help="how many schedules the simulation lives through")
