"""What the workers' logs say: who stepped when, at which place, and where the time of a change went."""

from __future__ import annotations

import bisect
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

# So many steps before an event say how long a usual one takes.
USUAL_STEPS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One completed step of one worker. asked_s: when its loop asked for it."""

    pid: int
    node: str
    rank: int
    world_size: int
    generation: int
    step: int
    asked_s: float
    done_s: float

    @property
    def place(self) -> tuple[int, int, int]:
        """Differs after every recovery: another process, another generation, or another world size."""
        return self.pid, self.generation, self.world_size


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a change has ended on one worker."""

    pid: int
    node: str
    name: str
    at_s: float
    size_bytes: int


class Timeline:
    """Reads a directory's logs as they grow. Times are of the workers' clock, in seconds."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read_to: dict[Path, int] = defaultdict(int)
        self._rows: dict[int, list[Row]] = defaultdict(list)
        self._stages: dict[int, list[Stage]] = defaultdict(list)

    def update(self) -> None:
        """Take in what was written since the last time."""
        for path in self._directory.glob("*.steps"):
            self._rows[int(path.stem)] += [Row(**entry) for entry in self._new_lines(path)]
        for path in self._directory.glob("*.stages"):
            self._stages[int(path.stem)] += [Stage(**entry) for entry in self._new_lines(path)]

    def last(self, node: str) -> Row | None:
        """The latest step of a node's present worker."""
        ends = [rows[-1] for rows in self._rows.values() if rows and rows[-1].node == node]
        return max(ends, key=attrgetter("done_s"), default=None)

    def together(self, nodes: Iterable[str], since_s: float) -> bool:
        """Whether all these nodes, and no others, have stepped in one generation since then."""
        last = [self.last(node) for node in nodes]
        rows = [row for row in last if row is not None and row.done_s > since_s]
        return len(rows) == len(last) and {(r.generation, r.world_size) for r in rows} == {
            (rows[0].generation, len(rows))
        }

    def steps(self, node: str, start_s: float, end_s: float) -> list[Row]:
        """A node's steps from the last one before `start_s` to `end_s`, over all its workers."""
        found = []
        for rows in self._rows.values():
            if rows and rows[0].node == node:
                first = bisect.bisect_right(rows, start_s, key=attrgetter("done_s"))
                end = bisect.bisect_right(rows, end_s, key=attrgetter("done_s"))
                found += rows[max(first - 1, 0) : end]
        found.sort(key=attrgetter("done_s"))
        before = [row for row in found if row.done_s <= start_s][-1:]
        return before + [row for row in found if row.done_s > start_s]

    def steps_in_place(self, node: str) -> int:
        """How many steps a node's worker has done since its place changed last."""
        row = self.last(node)
        rows = self._rows[row.pid] if row else []
        return sum(1 for _ in takewhile(lambda done: row is not None and done.place == row.place, reversed(rows)))

    def recovered(self, node: str, event_s: float) -> Row | None:
        """The node's first step after the event at a place that is not the one of before."""
        before, *after = self.steps(node, event_s, float("inf"))
        return next((row for row in after if row.place != before.place), None)

    def step_before(self, row: Row) -> Row:
        """A node's step before another one of its steps."""
        return self.steps(row.node, float("-inf"), row.done_s)[-2]

    def longest_gap(self, node: str, start_s: float, end_s: float) -> float:
        """Between two consecutive steps of a node."""
        times_s = [row.done_s for row in self.steps(node, start_s, end_s)]
        return max(after - before for before, after in pairwise(times_s))

    def usual_step_s(self, nodes: Iterable[str], before_s: float) -> float:
        """The median of the latest steps before a moment."""
        gaps = []
        for node in nodes:
            times_s = [row.done_s for row in self.steps(node, float("-inf"), before_s)][-USUAL_STEPS - 1 :]
            gaps += [after - before for before, after in pairwise(times_s)]
        return statistics.median(gaps)

    def repeated(self, start_s: float, end_s: float) -> int:
        """How many steps were reported in more than one generation."""
        generations: dict[int, set[int]] = defaultdict(set)
        for rows in self._rows.values():
            for row in rows:
                if start_s <= row.done_s <= end_s:
                    generations[row.step].add(row.generation)
        return sum(len(seen) > 1 for seen in generations.values())

    def stages(self, row: Row, event_s: float) -> dict[str, float]:
        """Where the time between an event and a worker's recovering step went, in seconds, by stage."""
        spent: dict[str, float] = defaultdict(float)
        before_s = event_s
        for stage in self._stages[row.pid]:
            if event_s < stage.at_s <= row.done_s:
                spent[stage.name] += stage.at_s - before_s
                before_s = stage.at_s
        return spent

    def state_bytes(self) -> int:
        """How large the state is that travels to those who join."""
        return max((stage.size_bytes for stages in self._stages.values() for stage in stages), default=0)

    def all_rows(self) -> list[Row]:
        """Every step of every worker, in the order of time."""
        return sorted((row for rows in self._rows.values() for row in rows), key=attrgetter("done_s"))

    def _new_lines(self, path: Path) -> list[dict[str, Any]]:
        if path.stat().st_size == self._read_to[path]:
            return []
        with path.open("rb") as file:
            file.seek(self._read_to[path])
            whole, newline, _ = file.read().rpartition(b"\n")  # the last line may be half written yet
        self._read_to[path] += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]
