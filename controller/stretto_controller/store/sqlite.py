"""The default store: one SQLite file. What was acknowledged survives kill -9 and loss of power."""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from stretto_controller.core.model import Record
from stretto_controller.curve import Point
from stretto_controller.store.codec import CodecError, decode, encode
from stretto_controller.store.contents import (
    GenerationSummary,
    Leader,
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
# Saves that share one commit; more would make the first of them wait too long.
_GROUP_LIMIT = 1000
_BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    save: Save
    saved: asyncio.Future[None]


class SqliteStore:
    """A `Store` in `data_dir`, which it locks. One thread writes; saves that wait together share one commit."""

    def __init__(self, data_dir: Path, *, kept_events: int, kept_generations: int) -> None:
        """Open or create the file. Raises StoreError when the directory is in use or the file is not ours."""
        # Never: the lock goes with the process.
        self.lost = asyncio.Event()
        self._kept_events = kept_events
        self._kept_generations = kept_generations
        self._path = data_dir / "controller.sqlite3"
        self._lock = _lock(data_dir)
        try:
            self._database = _open(self._path)
        except BaseException:
            os.close(self._lock)
            raise
        self._waiting: deque[_Waiting] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._failure: StoreError | None = None
        self._writer: threading.Thread | None = None

    @property
    def leader(self) -> Leader:
        return Leader()

    @property
    def lost_reason(self) -> str:
        return ""

    async def lead(self, me: Leader) -> None:
        """At once: the directory is locked."""

    def leads(self) -> bool:
        return True

    async def load(self) -> Stored:
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

    def save(self, save: Save) -> asyncio.Future[None]:
        """Queue the save for the writer thread. Call from the event loop."""
        loop = asyncio.get_running_loop()
        saved: asyncio.Future[None] = loop.create_future()
        with self._wake:
            if self._failure is not None:
                saved.set_exception(self._failure)
                return saved
            assert not self._closing, "save after close"
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, args=(loop,), name="store", daemon=True)
                self._writer.start()
            self._waiting.append(_Waiting(save, saved))
            self._wake.notify()
        return saved

    async def close(self) -> None:
        """Write what waits, then close the file and free the lock."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._writer is not None:
            await asyncio.to_thread(self._writer.join)
        self._database.close()
        os.close(self._lock)

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

    def _write(self, loop: asyncio.AbstractEventLoop) -> None:
        """The writer thread: one transaction for all that waits, then one call back into the loop."""
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), _GROUP_LIMIT))]
            if not group:
                return
            failure = self._failure or self._commit([waiting.save for waiting in group])
            if failure is not None:
                with self._wake:
                    self._failure = failure
            try:
                loop.call_soon_threadsafe(_resolve, group, failure)
            except RuntimeError:
                # The loop is closed: nobody waits for an answer any more.
                return

    def _commit(self, saves: list[Save]) -> StoreError | None:
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for save in _merged(saves):
                    self._apply(save)
        # Whatever went wrong, the answer is the same: this was not saved.
        except Exception as error:  # noqa: BLE001
            failure = StoreError(f"cannot save to {self._path}: {error}")
            failure.__cause__ = error
            return failure
        return None

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


def _resolve(group: list[_Waiting], failure: StoreError | None) -> None:
    for waiting in group:
        if waiting.saved.done():
            continue
        if failure is None:
            waiting.saved.set_result(None)
        else:
            waiting.saved.set_exception(failure)


def _lock(data_dir: Path) -> int:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"cannot use data directory {data_dir}: {error}; give another --data-dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 32).decode(errors="replace") or "unknown"
        os.close(lock)
        raise StoreError(
            f"data directory {data_dir} is in use by another controller (process {holder}); "
            "end that one or give another --data-dir"
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def _open(path: Path) -> sqlite3.Connection:
    try:
        # The writer thread uses the connection too, but only after load(); never both at once.
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
