"""What a worker writes while it trains: one JSON line per completed step, and one per stage of a change.

All times are CLOCK_MONOTONIC, which the processes of one machine share.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class WorkerLog:
    """Appends to $WORKER_LOG_DIR/PID.steps and PID.stages; each line is written whole."""

    def __init__(self) -> None:
        path = Path(os.environ["WORKER_LOG_DIR"]) / str(os.getpid())
        self._head = {"pid": os.getpid(), "node": os.environ["WORKER_NODE"]}
        self._steps = open(path.with_suffix(".steps"), "a", buffering=1)  # noqa: SIM115  # as long as the process
        self._stages = open(path.with_suffix(".stages"), "a", buffering=1)  # noqa: SIM115

    def step(self, asked_s: float, *, rank: int, world_size: int, generation: int, step: int) -> None:
        """A step is complete. asked_s: when the loop asked for it."""
        place = {"rank": rank, "world_size": world_size, "generation": generation}
        row = {**self._head, **place, "step": step, "asked_s": asked_s, "done_s": time.monotonic()}
        self._steps.write(json.dumps(row) + "\n")

    def stage(self, name: str, size_bytes: int = 0) -> None:
        """A stage of a change ends now. size_bytes: of the state that it moves, if any."""
        row = {**self._head, "name": name, "at_s": time.monotonic(), "size_bytes": size_bytes}
        self._stages.write(json.dumps(row) + "\n")
