"""The run so far, in few numbers: what a checkpoint tells of it where no controller is left to ask."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stretto.progress_report import StepFigures

_LIMIT = 500


class Point(NamedTuple):
    """The figures after one step. time_s: wall-clock, of the rank that kept it; rates are the first group's."""

    time_s: float
    generation: float
    workers: float
    step: float
    tau: float
    gain: float
    scale: float
    loss: float
    effective_lr: float
    base_lr: float


class Chronicle:
    """At most `limit` points of a run, oldest first: the longer it is, the more steps lie between two of them.

    It is part of the trainer's state, 40 kB at most. Its times are each rank's own: rank 0's are saved.
    """

    def __init__(self, target_tau: float, limit: int = _LIMIT) -> None:
        self.target_tau = target_tau
        self._limit = limit
        self._stride = 1
        # The latest point is there until the next one comes.
        self._passing = False
        self._columns = {name: array("d") for name in Point._fields}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __iter__(self) -> Iterator[Point]:
        return map(Point._make, zip(*self._columns.values(), strict=True))

    def note(self, figures: StepFigures, *, generation: int, workers: int, time_s: float) -> None:
        """Keep the latest step, and for good if it begins a generation or enough have passed since the one before."""
        # A step that is done again takes the place of its first try.
        while len(self) and (self._passing or self._columns["step"][-1] >= figures.step):
            self._passing = False
            for column in self._columns.values():
                column.pop()
        same = len(self) > 0 and self._columns["generation"][-1] == generation
        self._passing = same and figures.step - self._columns["step"][-1] < self._stride
        point = Point(
            time_s,
            generation,
            workers,
            figures.step,
            figures.tau,
            figures.gain,
            figures.scale,
            figures.loss,
            figures.effective_lr[0],
            figures.base_lr[0],
        )
        for name, value in zip(Point._fields, point, strict=True):
            self._columns[name].append(value)
        if len(self) > self._limit:
            self._thin_out()

    def state_dict(self) -> dict[str, Any]:
        columns = {name: column.tobytes() for name, column in self._columns.items()}
        return {"target_tau": self.target_tau, "stride": self._stride, "passing": self._passing, "columns": columns}

    def load_state_dict(self, d: Mapping[str, Any]) -> None:
        """Go on from there; the target stays this script's own."""
        columns = {name: array("d", d["columns"][name]) for name in Point._fields}
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError("the chronicle's columns differ in length: something else wrote them")
        self._columns, self._stride, self._passing = columns, int(d["stride"]), bool(d["passing"])

    @classmethod
    def saved(cls, d: Mapping[str, Any]) -> Chronicle:
        """One that was saved, for reading."""
        chronicle = cls(float(d["target_tau"]))
        chronicle.load_state_dict(d)
        return chronicle

    def _thin_out(self) -> None:
        """Every second one goes; generations keep their first as long as they are not too many for that."""
        generations = self._columns["generation"]
        firsts = [here for here in range(1, len(self), 2) if generations[here] != generations[here - 1]]
        kept = sorted({*range(0, len(self), 2), len(self) - 1, *(firsts if len(firsts) < self._limit // 4 else ())})
        for name, column in self._columns.items():
            self._columns[name] = array("d", [column[index] for index in kept])
        self._stride *= 2
