"""What a trainer writes into its log of samples, from one generation to the next."""

from __future__ import annotations

import os
from typing import Protocol

from stretto.position import Position
from stretto.sample_log import SampleLog
from stretto.sampler import ElasticSampler


class Place(Protocol):
    """A rank's place in the generation that trains."""

    @property
    def number(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def restored(self) -> bool: ...


class SampleRecord:
    """Keeps the log of one trainer from generation to generation, while this is rank 0; path: None for no log."""

    def __init__(self, path: str | os.PathLike[str] | None, position: Position, sampler: ElasticSampler) -> None:
        self._path = path
        self._position = position
        self._sampler = sampler
        self._log: SampleLog | None = None
        self._logged_step = 0

    def begin(self, place: Place) -> None:
        """The state of a generation is here, its steps so far included."""
        if self._path is None or place.rank != 0:
            return
        position = self._position
        self._logged_step = position.step - len(position.recent)
        self._log = SampleLog(
            self._path,
            generation=place.number,
            repeats_after=self._logged_step,
            resumed_step=position.step if place.restored else None,
        )
        self.committed(position.step)

    def committed(self, step: int) -> None:
        """All steps up to this one count."""
        if self._log is None:
            return
        for done in self._position.recent_between(self._logged_step, step):
            self._log.committed(done.step, done.epoch, self._sampler.global_batch(done.epoch, done.start, done.count))
            self._logged_step = done.step

    def close(self) -> None:
        """The generation is over."""
        if self._log is not None:
            self._log.close()
            self._log = None
