"""The default store on the fake clock: the real tables, in memory, and a writer that dies between any two steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from stretto_controller.store.contents import Leader, Save, Stored
from stretto_controller.store.database import Database

if TYPE_CHECKING:
    from simulation.cluster.world import World


class DiskStore:
    """`SqliteStore` without its file, its lock and its thread. database: outlives the process."""

    def __init__(self, world: World, database: Database, alive: Callable[[], bool]) -> None:
        self.lost = asyncio.Event()
        self._world, self._database, self._alive = world, database, alive
        self._waiting: list[tuple[Save, asyncio.Future[None]]] = []
        self._writing = False

    @property
    def leader(self) -> Leader:
        return Leader()

    @property
    def lost_reason(self) -> str:
        return ""

    async def lead(self, me: Leader) -> None:
        """At once: nobody else has the disk."""

    def leads(self) -> bool:
        return True

    async def load(self) -> Stored:
        return self._database.load()

    def save(self, save: Save) -> asyncio.Future[None]:
        saved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._alive():
            return saved
        self._waiting.append((save, saved))
        if not self._writing:
            self._writing = True
            self._world.scheduler.after(self._world.write_s(), self._write)
        self._world.faults.moment("decided", 0)
        return saved

    async def close(self) -> None:
        pass

    def _write(self) -> None:
        """The writer thread takes what waits, and commits it."""
        if not self._alive():
            return
        group, self._waiting = self._waiting, []
        saves = [save for save, _ in group]
        self._world.invariants.disk_written(saves)
        self._database.commit(saves)
        self._world.faults.moment("applied", 0)
        self._world.scheduler.after(self._world.write_s(), self._written, [saved for _, saved in group])

    def _written(self, saved: list[asyncio.Future[None]]) -> None:
        """The event loop hears of it, and the thread goes on."""
        if not self._alive():
            return
        for each in saved:
            if not each.done():
                each.set_result(None)
        self._writing = bool(self._waiting)
        if self._waiting:
            self._world.scheduler.after(self._world.write_s(), self._write)
