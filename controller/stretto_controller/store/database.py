"""The tables of the default store in one SQLite file, and what a group of saves changes in them."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stretto_controller.core.model import Record
from stretto_controller.curve import Point
from stretto_controller.store.codec import CodecError, decode, encode
from stretto_controller.store.contents import (
    GenerationSummary,
    Marks,
    Save,
    Stored,
    StoredEvent,
    StoredJob,
    StoreError,
)

_POINT_COLUMNS = ", ".join(Point._fields)
# AUTOINCREMENT: sequence numbers of deleted jobs' events are not given out again.
_SCHEMA = """
CREATE TABLE jobs (name TEXT PRIMARY KEY, record TEXT NOT NULL, marks TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, time_s REAL NOT NULL, kind TEXT NOT NULL,
  reason TEXT NOT NULL, node_id TEXT NOT NULL, generation INTEGER NOT NULL);
CREATE INDEX events_by_job ON events (job, sequence);
CREATE TABLE generations (
  job TEXT NOT NULL, incarnation INTEGER NOT NULL, number INTEGER NOT NULL, summary TEXT NOT NULL,
  PRIMARY KEY (job, incarnation, number)) WITHOUT ROWID;
"""
_POINTS = f"""
CREATE TABLE points (
  job TEXT NOT NULL, {", ".join(f"{name} REAL" for name in Point._fields)}, PRIMARY KEY (job, time_s)) WITHOUT ROWID;
"""
# What each schema version added to the one before.
_VERSIONS = (_SCHEMA, _POINTS)
SCHEMA_VERSION = len(_VERSIONS)
_BUSY_TIMEOUT_S = 5.0


class Database:
    """One file, or `:memory:`. A group of saves is committed whole or not at all, whenever the process ends."""

    def __init__(self, path: Path | str, *, kept_events: int, kept_generations: int) -> None:
        """Open or create the file. Raises StoreError when it is not ours."""
        self._path = path
        self._kept_events = kept_events
        self._kept_generations = kept_generations
        self._database = _open(path)

    def load(self) -> Stored:
        """All jobs, each with its latest events and generations, oldest first."""
        try:
            jobs = tuple(
                self._load_job(name, decode(Record, record), decode(Marks, marks))
                for name, record, marks in self._database.execute("SELECT name, record, marks FROM jobs ORDER BY name")
            )
            row = self._database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        except (sqlite3.Error, CodecError) as error:
            raise StoreError(f"cannot read {self._path}: {error}") from error
        return Stored(jobs, row[0] if row else 0)

    def commit(self, saves: list[Save]) -> None:
        """One transaction for all of them. Raises StoreError, and then nothing of it was saved."""
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for save in _merged(saves):
                    self._apply(save)
        # Whatever went wrong, the answer is the same: this was not saved.
        except Exception as error:
            raise StoreError(f"cannot save to {self._path}: {error}") from error

    def close(self) -> None:
        self._database.close()

    def _load_job(self, name: str, record: Record, marks: Marks) -> StoredJob:
        events = self._database.execute(
            "SELECT sequence, time_s, kind, reason, node_id, generation FROM events WHERE job = ? ORDER BY sequence",
            (name,),
        )
        generations = self._database.execute(
            "SELECT summary FROM generations WHERE job = ? ORDER BY incarnation, number", (name,)
        )
        return StoredJob(
            record,
            marks,
            tuple(StoredEvent(*row) for row in events),
            tuple(decode(GenerationSummary, summary) for (summary,) in generations),
            tuple(self._load_points(name)),
        )

    def _load_points(self, name: str) -> Iterator[Point]:
        for row in self._database.execute(
            f"SELECT {_POINT_COLUMNS} FROM points WHERE job = ? ORDER BY time_s",  # our own names
            (name,),
        ):
            # SQLite keeps NaN as NULL.
            yield Point(*(math.nan if value is None else value for value in row))

    def _apply(self, save: Save) -> None:
        run = self._database.execute
        if save.forget:
            run("DELETE FROM jobs WHERE name = ?", (save.job,))
            run("DELETE FROM events WHERE job = ?", (save.job,))
            run("DELETE FROM generations WHERE job = ?", (save.job,))
            run("DELETE FROM points WHERE job = ?", (save.job,))
            return
        if save.record is not None:
            run(
                "INSERT INTO jobs VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET record = excluded.record, marks = excluded.marks",
                (save.job, encode(save.record), encode(save.marks)),
            )
        if save.events:
            self._database.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(e.sequence, save.job, e.time_s, e.kind, e.reason, e.node_id, e.generation) for e in save.events],
            )
            run(
                "DELETE FROM events WHERE job = ?1 AND sequence <="
                " (SELECT sequence FROM events WHERE job = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
                (save.job, self._kept_events),
            )
        if save.generations:
            self._database.executemany(
                "INSERT OR REPLACE INTO generations VALUES (?, ?, ?, ?)",
                [(save.job, *summary.key, encode(summary)) for summary in save.generations],
            )
            run(
                "DELETE FROM generations WHERE job = ?1 AND (incarnation, number) <= (SELECT incarnation, number"
                " FROM generations WHERE job = ?1 ORDER BY incarnation DESC, number DESC LIMIT 1 OFFSET ?2)",
                (save.job, self._kept_generations),
            )
        if save.points_anew:
            run("DELETE FROM points WHERE job = ?", (save.job,))
        if save.points:
            marks = ", ".join("?" * (1 + len(Point._fields)))
            self._database.executemany(
                f"INSERT OR REPLACE INTO points VALUES ({marks})",
                [(save.job, *point) for point in save.points],
            )


def _merged(saves: list[Save]) -> list[Save]:
    """The same outcome with each job's record written once: 256 nodes that join together cost one record."""
    last_record = {save.job: index for index, save in enumerate(saves) if save.record is not None or save.forget}
    return [
        save if save.record is None or last_record[save.job] == index else replace(save, record=None)
        for index, save in enumerate(saves)
    ]


def _open(path: Path | str) -> sqlite3.Connection:
    try:
        # A writer thread uses the connection too, but only after load(); never both at once.
        database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"cannot open {path}: {error}") from error
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version < SCHEMA_VERSION:
            added = "".join(_VERSIONS[version:])
            database.executescript(f"BEGIN IMMEDIATE; {added} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    except sqlite3.Error as error:
        database.close()
        raise StoreError(f"{path} is not a controller's database: {error}; give another --data-dir") from error
    if version > SCHEMA_VERSION:
        database.close()
        raise StoreError(
            f"{path} has schema version {version}, and this release knows versions up to {SCHEMA_VERSION}; "
            "use the newer release that wrote it, or another --data-dir"
        )
    return database
