"""What the harness starts ends with it, also where its start fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import controller
from harness.controller import ControllerProcess


def test_a_controller_that_does_not_serve_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "START_LIMIT_S", 0.0)
    process = ControllerProcess(tmp_path)
    with pytest.raises(AssertionError, match="did not serve in time"):
        process.__enter__()
    assert not process.alive()
    assert _processes_in(tmp_path) == []


def _processes_in(directory: Path) -> list[str]:
    """Command lines that name the directory."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(directory) in line]
