"""A job of live workers (tests/e2e/scripts/live.py) under a real controller: faults put in, and what came of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stretto.sample_log import effective_steps, used_exactly_once

from harness.agents import PATIENCE_S, Agents
from harness.controller import ControllerProcess

SCRIPT = "live.py"
RESTARTS = 10_000
# A worker that is stopped before it begins a session is ended by its agent.
_START = "sign_in_limit=60"


class LiveJob:
    """Starts agents, injects faults by file, waits, and reads the evidence."""

    def __init__(
        self, directory: Path, controller: ControllerProcess, agents: Agents, *, stock: bool = False, **options: Any
    ) -> None:
        """options: of the script. stock: torchrun's own agent rather than `stretto run`."""
        self.directory = directory
        self.controller = controller
        self.agents = agents
        agents.tells_stacks = True
        self._stock = stock
        self._options = json.dumps(options)

    def start(self, name: str, slots: int = 1, *, stock: bool | None = None) -> None:
        """Add a node. stock: other than the job's other nodes. Its workers may fail as often as they like."""
        args = (str(self.directory), self._options)
        if self._stock if stock is None else stock:
            conf = f"reconfigure=in-process,{_START}"
            self.agents.torchrun(name, SCRIPT, *args, slots=slots, max_restarts=RESTARTS, conf=conf)
        else:
            self.agents.stretto_run(
                name, SCRIPT, *args, slots=slots, max_restarts=RESTARTS, reconfigure=None, conf=_START
            )

    def inject(self, name: str, point: str, kind: str, *, local_rank: int = 0, step: int = 0) -> None:
        """Have a worker fail at a point: KILL, STOP, raise, memory, or sleep (for 4 s)."""
        path = self.directory / f"fault-{name}-{local_rank}"
        path.with_suffix(".new").write_text(json.dumps({"point": point, "kind": kind, "step": step}))
        path.with_suffix(".new").rename(path)

    def struck(self, name: str, local_rank: int = 0) -> None:
        """Wait until the fault has happened."""
        done = self.directory / f"done-fault-{name}-{local_rank}"
        self.until(done.exists, f"the fault of {name} did not happen")
        done.unlink()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, self.agents.story(what)
            time.sleep(0.02)

    def pace(self, step_s: float) -> None:
        """From now on workers rest this long after each step, so that training does not end before its test."""
        path = self.directory / "pace"
        path.with_suffix(".new").write_text(str(step_s))
        path.with_suffix(".new").rename(path)

    def step(self) -> int:
        """The latest step that any worker has reported."""
        return max((row.step for row in self.agents.rows()), default=0)

    def generation(self) -> int:
        """The newest generation that any worker has made a step in."""
        return max((row.generation for row in self.agents.rows()), default=0)

    def steps_since(self, generation: int, *, without: int = 0) -> set[str]:
        """Nodes whose workers, but for that process, have made a step in a newer generation."""
        return {row.node for row in self.agents.rows() if row.generation > generation and row.pid != without}

    def check_samples(self) -> int:
        """Each sample of each epoch once, and no step taken back; returns how many steps the log holds."""
        lines = (self.directory / "samples").read_text().splitlines()
        steps = effective_steps(lines)  # raises where a step was done again
        assert used_exactly_once(lines), "a sample was used twice in an epoch, or left out"
        return len(steps)

    def finish(self, more_steps: int = 50) -> int:
        """Have the job reach its target in so many steps, which every worker must learn of before; the last step."""
        last = self.step() + more_steps
        path = self.directory / "last-step"
        path.with_suffix(".new").write_text(str(last))
        path.with_suffix(".new").rename(path)
        return last

    def check_states(self) -> int:
        """All ranks held the same bits after the same step of a generation; returns of how many that is known."""
        found: dict[tuple[int, int], dict[Path, int]] = {}
        for path in self.directory.glob("states-*.jsonl"):
            for entry in (json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"):
                found.setdefault((entry["generation"], entry["step"]), {})[path] = entry["state"]
        for (generation, step), states in found.items():
            assert len(set(states.values())) == 1, f"generation {generation}, step {step}: {states}"
        return sum(len(states) > 1 for states in found.values())

    def losses(self) -> dict[int, float]:
        """By step, over all workers, which must agree to the last bit on steps that were done once."""
        found: dict[int, float] = {}
        for path in self.directory.glob("losses-*.jsonl"):
            last, last_tau = 0, 0.0
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                assert entry["step"] > last, f"{path.name}: step {entry['step']} after {last}"
                assert entry["tau"] >= last_tau, f"{path.name}: tau {entry['tau']} after {last_tau}"
                last, last_tau = entry["step"], entry["tau"]
                known = found.setdefault(entry["step"], entry["loss"])
                assert math.isclose(known, entry["loss"], rel_tol=1e-9), f"step {entry['step']}: {known}, {entry}"
        return found
