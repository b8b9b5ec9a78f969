"""How a worker's interpreter ends after a failure."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

PROGRAM = """
import atexit
from stretto.process import end_quickly_after

class Module:
    def __del__(self):
        print("torn down")

module = Module()
atexit.register(print, "exit handler")
try:
    try:
        raise ValueError("the collective failed")
    except ValueError as error:
        end_quickly_after(error)
        raise
except {caught}:
    print("handled")
"""


def _run(caught: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(caught=caught)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)


def test_an_unhandled_failure_skips_the_teardown_but_no_exit_handler() -> None:
    ended = _run(caught="KeyError")
    assert ended.returncode == 1
    assert ended.stdout == "exit handler\n"
    assert "ValueError: the collective failed" in ended.stderr


def test_a_handled_failure_changes_nothing() -> None:
    ended = _run(caught="ValueError")
    assert ended.returncode == 0
    assert ended.stdout == "handled\nexit handler\ntorn down\n"
