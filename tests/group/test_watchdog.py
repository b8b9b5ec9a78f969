from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from stretto.group.watchdog import EXIT_STUCK, Watchdog


def test_fires_once_for_a_section_that_lasts_too_long() -> None:
    fired = threading.Event()
    sections: list[str] = []

    def note(section: str) -> None:
        sections.append(section)
        fired.set()

    watchdog = Watchdog(0.05, note)
    with watchdog.watch("quick"):
        pass
    with watchdog.watch("slow"):
        assert fired.wait(10)
    assert sections == ["slow"]
    assert watchdog.firings == 1


def test_several_sections_are_watched_at_once() -> None:
    fired: list[str] = []
    both = threading.Event()

    def note(section: str) -> None:
        fired.append(section)
        if len(fired) == 2:
            both.set()

    watchdog = Watchdog(0.05, note)
    with watchdog.watch("first"), watchdog.watch("second"):
        assert both.wait(10)
    assert sorted(fired) == ["first", "second"]


@pytest.mark.e2e
def test_the_default_ends_the_process_with_a_code_of_its_own_and_every_stack() -> None:
    program = """
import threading
from stretto.group.watchdog import Watchdog
with Watchdog(0.05).watch("a test"):
    threading.Event().wait()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_STUCK
    assert "stuck in a test" in ended.stderr
    assert "Current thread" in ended.stderr
