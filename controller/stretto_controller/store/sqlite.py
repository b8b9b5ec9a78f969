"""The default store: one SQLite file. What was acknowledged survives kill -9 and loss of power."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from stretto_controller.store.contents import Leader, Save, Stored, StoreError
from stretto_controller.store.database import Database

# Saves that share one commit; more would make the first of them wait too long.
_GROUP_LIMIT = 1000


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
        self._lock = _lock(data_dir)
        path = data_dir / "controller.sqlite3"
        try:
            self._database = Database(path, kept_events=kept_events, kept_generations=kept_generations)
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
        return self._database.load()

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
            self._database.commit(saves)
        except StoreError as error:
            return error
        return None


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
