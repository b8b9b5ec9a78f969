"""`stretto doctor` on a machine without a controller: what it finds, and what to do."""

from __future__ import annotations

import os
import subprocess

import pytest
from harness.controller import STRETTO


@pytest.mark.e2e
def test_a_machine_without_a_controller_is_told_what_to_do_and_which_backends_it_has() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRETTO_")}
    done = subprocess.run(
        [STRETTO, "doctor", "--endpoint", "127.0.0.1:1"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith("ok     Python 3") for line in lines)
    assert any(line.startswith("WRONG  127.0.0.1:1") for line in lines)
    assert any("is `stretto controller` running there" in line for line in lines)
    assert any(line.startswith("ok     torch's backends: gloo") for line in lines)
