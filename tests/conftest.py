"""What holds for all tests: none is judged by the clock, and a GPU is used by those that ask for one, by no others."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# The machine may be busy; and a failure is to be about the change, so the same examples are drawn each time.
settings.register_profile(
    "stretto", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, print_blob=True
)
settings.load_profile("stretto")

_MARKS = ("gpu", "gpus")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from ordinary tests: what they start would use them, several processes one GPU.

    And take up SIGINT, which a shell has its background jobs, and so all that the tests start, ignore.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not _asked_for(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests that need a GPU out, unless `-m` asks for them; then they fail where there is none."""
    if _asked_for(config):
        return
    without = [item for item in items if not any(item.get_closest_marker(mark) for mark in _MARKS)]
    if len(without) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in without])
        items[:] = without


def _asked_for(config: pytest.Config) -> bool:
    return any(mark in (config.getoption("markexpr") or "") for mark in _MARKS)
