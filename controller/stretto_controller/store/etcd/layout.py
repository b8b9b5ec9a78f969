"""Where each thing is kept in etcd, and which puts and deletions a group of saves amounts to. Pure.

PREFIX leader                                 who leads
PREFIX last_save                              request id of the latest write
PREFIX sequence                               the highest sequence number ever given to an event
PREFIX jobs/JOB                               marks and record, a line each
PREFIX events/JOB/SEQUENCE                    the events of one write, a line each; SEQUENCE is the first one's
PREFIX points/JOB/TIME                        points of the curve, a line each; TIME is the first one's, in microseconds
PREFIX generations/JOB/INCARNATION.NUMBER     one generation's summary
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from stretto_proto.v1 import etcd_pb2 as etcd

from stretto_controller.core.model import Record
from stretto_controller.curve import Point
from stretto_controller.store.codec import decode, encode
from stretto_controller.store.contents import GenerationSummary, Marks, Save, Stored, StoredEvent, StoredJob

# etcd's limits are 128 operations and 1.5 MiB in one transaction; a single save needs fewer than 10.
_JOBS_LIMIT = 16
# More would make the first of them wait too long.
_GROUP_LIMIT = 1000
_SIZE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of keys under one prefix."""

    prefix: str

    @property
    def everything(self) -> tuple[bytes, bytes]:
        return self._under("")

    @property
    def leader(self) -> bytes:
        return f"{self.prefix}leader".encode()

    @property
    def last_save(self) -> bytes:
        return f"{self.prefix}last_save".encode()

    @property
    def sequence(self) -> bytes:
        return f"{self.prefix}sequence".encode()

    def job(self, job: str) -> bytes:
        return f"{self.prefix}jobs/{job}".encode()

    def events(self, job: str, sequence: int) -> bytes:
        return f"{self.prefix}events/{job}/{sequence:020}".encode()

    def generation(self, job: str, key: tuple[int, int]) -> bytes:
        return f"{self.prefix}generations/{job}/{key[0]:010}.{key[1]:020}".encode()

    def all_events(self, job: str) -> tuple[bytes, bytes]:
        return self._under(f"events/{job}/")

    def points(self, job: str, time_s: float) -> bytes:
        return f"{self.prefix}points/{job}/{round(time_s * 1e6):020}".encode()

    def all_points(self, job: str) -> tuple[bytes, bytes]:
        return self._under(f"points/{job}/")

    def all_generations(self, job: str) -> tuple[bytes, bytes]:
        return self._under(f"generations/{job}/")

    def _under(self, path: str) -> tuple[bytes, bytes]:
        """The range of all keys that begin so."""
        start = f"{self.prefix}{path}".encode()
        return start, start[:-1] + bytes([start[-1] + 1])


@dataclass(slots=True)
class _Kept:
    """Which keys of a job are there, oldest first, so that the oldest can be deleted without a look."""

    # First sequence number and number of events of each key.
    events: deque[tuple[int, int]] = field(default_factory=deque)
    generations: deque[tuple[int, int]] = field(default_factory=deque)


class Layout:
    """Turns stored keys into what the runner loads, and saves into operations, and knows which keys are too old."""

    def __init__(self, keys: Keys, *, kept_events: int, kept_generations: int) -> None:
        self._keys = keys
        self._kept_events = kept_events
        self._kept_generations = kept_generations
        self._kept: dict[str, _Kept] = {}

    def read(self, pairs: Iterable[tuple[bytes, bytes]]) -> Stored:
        """What these keys and values, in the keys' order, mean. Raises CodecError."""
        jobs: dict[str, tuple[Record, Marks]] = {}
        events: dict[str, list[StoredEvent]] = {}
        generations: dict[str, list[GenerationSummary]] = {}
        points: dict[str, dict[float, Point]] = {}
        last_sequence = 0
        for key, value in pairs:
            kind, _, rest = key.decode().removeprefix(self._keys.prefix).partition("/")
            job, lines = rest.partition("/")[0], value.decode().split("\n")
            if kind == "sequence":
                last_sequence = int(value)
            elif kind == "jobs":
                jobs[job] = decode(Record, lines[1]), decode(Marks, lines[0])
            elif kind == "events":
                chunk = [decode(StoredEvent, line) for line in lines]
                events.setdefault(job, []).extend(chunk)
                self._of(job).events.append((chunk[0].sequence, len(chunk)))
            elif kind == "points":
                points.setdefault(job, {}).update((point.time_s, point) for point in map(_point, lines))
            elif kind == "generations":
                summary = decode(GenerationSummary, lines[0])
                generations.setdefault(job, []).append(summary)
                self._of(job).generations.append(summary.key)
        return Stored(
            tuple(
                StoredJob(
                    record,
                    marks,
                    tuple(events.get(name, ())[-self._kept_events :]),
                    tuple(generations.get(name, ())),
                    tuple(points.get(name, {}).values()),
                )
                for name, (record, marks) in jobs.items()
            ),
            last_sequence,
        )

    def operations(self, saves: list[Save]) -> list[etcd.EtcdRequestOp]:
        """What a group of saves writes. No key is touched twice, which etcd would refuse."""
        puts: dict[bytes, bytes] = {}
        deletes: list[tuple[bytes, bytes]] = []
        last_sequence = max((event.sequence for save in saves for event in save.events), default=0)
        for job, own in groupby(sorted(saves, key=lambda save: save.job), key=lambda save: save.job):
            self._job(job, list(own), puts, deletes)
        if last_sequence:
            puts[self._keys.sequence] = str(last_sequence).encode()
        return [*(put(key, value) for key, value in puts.items()), *(_delete(*between) for between in deletes)]

    def _job(self, job: str, saves: list[Save], puts: dict[bytes, bytes], deletes: list[tuple[bytes, bytes]]) -> None:
        if saves[-1].forget:
            self._kept.pop(job, None)
            ranges = (self._keys.all_events(job), self._keys.all_generations(job), self._keys.all_points(job))
            deletes += [(self._keys.job(job), b""), *ranges]
            return
        latest = next((save for save in reversed(saves) if save.record is not None), None)
        if latest is not None:
            puts[self._keys.job(job)] = f"{encode(latest.marks)}\n{encode(latest.record)}".encode()
        events = [event for save in saves for event in save.events]
        if events:
            self._of(job).events.append((events[0].sequence, len(events)))
            puts[self._keys.events(job, events[0].sequence)] = "\n".join(map(encode, events)).encode()
            deletes += self._too_old_events(job)
        self._points(job, saves, puts, deletes)
        generations = {summary.key: summary for save in saves for summary in save.generations}
        if generations:
            known = self._of(job).generations
            known.extend(sorted(generations.keys() - set(known)))
            deletes += self._too_old_generations(job)
            for key, summary in generations.items():
                if key >= known[0]:
                    puts[self._keys.generation(job, key)] = encode(summary).encode()

    def _points(
        self, job: str, saves: list[Save], puts: dict[bytes, bytes], deletes: list[tuple[bytes, bytes]]
    ) -> None:
        anew = max((index for index, save in enumerate(saves) if save.points_anew), default=-1)
        points = [point for save in saves[max(anew, 0) :] for point in save.points]
        start, end = self._keys.all_points(job)
        if points:
            key = self._keys.points(job, points[0].time_s)
            puts[key] = "\n".join(json.dumps(point) for point in points).encode()
            if anew >= 0:
                deletes += [(start, key), (key + b"\0", end)]
        elif anew >= 0:
            deletes.append((start, end))

    def _too_old_events(self, job: str) -> list[tuple[bytes, bytes]]:
        chunks = self._of(job).events
        spare = sum(count for _, count in chunks) - self._kept_events
        dropped = False
        while chunks[0][1] <= spare:
            spare -= chunks.popleft()[1]
            dropped = True
        return [(self._keys.events(job, 0), self._keys.events(job, chunks[0][0]))] if dropped else []

    def _too_old_generations(self, job: str) -> list[tuple[bytes, bytes]]:
        known = self._of(job).generations
        dropped = False
        while len(known) > self._kept_generations:
            known.popleft()
            dropped = True
        return [(self._keys.generation(job, (0, 0)), self._keys.generation(job, known[0]))] if dropped else []

    def _of(self, job: str) -> _Kept:
        return self._kept.setdefault(job, _Kept())


def group_length(saves: Sequence[Save]) -> int:
    """How many of the oldest saves may share a transaction: at least one; a job that is forgotten ends its part."""
    jobs: set[str] = set()
    forgotten: set[str] = set()
    size_bytes = 0
    for length, save in enumerate(saves[:_GROUP_LIMIT]):
        jobs.add(save.job)
        size_bytes += _size_bytes(save)
        if length and (save.job in forgotten or len(jobs) > _JOBS_LIMIT or size_bytes > _SIZE_LIMIT_BYTES):
            return length
        if save.forget:
            forgotten.add(save.job)
    return min(len(saves), _GROUP_LIMIT)


def put(key: bytes, value: bytes) -> etcd.EtcdRequestOp:
    return etcd.EtcdRequestOp(request_put=etcd.EtcdPutRequest(key=key, value=value))


def _delete(start: bytes, end: bytes) -> etcd.EtcdRequestOp:
    return etcd.EtcdRequestOp(request_delete_range=etcd.EtcdDeleteRangeRequest(key=start, range_end=end))


def _point(line: str) -> Point:
    return Point(*map(float, json.loads(line)))


def _size_bytes(save: Save) -> int:
    """Roughly, and rather too much than too little."""
    nodes = len(save.record.nodes) if save.record is not None else 0
    members = sum(len(summary.generation.members) for summary in save.generations)
    reasons = sum(200 + 4 * len(event.reason) for event in save.events)
    return 1000 + 800 * nodes + 300 * members + reasons + 250 * len(save.points)
