"""What the tests of the page share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.browser import Window, chromium
from harness.controller import ControllerProcess
from harness.raw_job import PATIENT_LIMITS
from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path, STRETTO_SERVICE_POINT_INTERVAL_S="0.2", **PATIENT_LIMITS) as controller:
        yield controller


@pytest.fixture
def window(browser: Browser) -> Iterator[Window]:
    window = Window(browser)
    yield window
    window.close()
