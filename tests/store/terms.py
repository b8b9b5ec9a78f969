"""Stores in a real etcd as its tests use them: one that leads, and a key that is watched."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import aclosing

from stretto_controller.core.model import JobSpec, Record
from stretto_controller.settings import EtcdSettings
from stretto_controller.store.contents import Leader
from stretto_controller.store.etcd.connection import Connection
from stretto_controller.store.etcd.store import EtcdStore

RECORD = Record("a", JobSpec(min_nodes=1, max_nodes=4))
ME = Leader("127.0.0.1:29400", "http://127.0.0.1:8080")
WAIT_S = 60.0


async def begin(settings: EtcdSettings, terms: list[EtcdStore]) -> EtcdStore:
    """A store that leads."""
    store = EtcdStore(settings, kept_events=10, kept_generations=10)
    terms.append(store)
    async with asyncio.timeout(WAIT_S):
        await store.lead(ME)
    await store.load()
    return store


async def eventually(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not check():
            await asyncio.sleep(0.02)


class Watched:
    """What a follow of one key has yielded so far."""

    def __init__(self, connection: Connection, key: str) -> None:
        self.values: list[str | None] = []
        self._task = asyncio.create_task(self._follow(connection, key.encode()))

    async def _follow(self, connection: Connection, key: bytes) -> None:
        async with aclosing(connection.follow(key)) as values:
            async for value in values:
                self.values.append(None if value is None else value.value.decode())

    async def sees(self, *values: str | None) -> None:
        await eventually(lambda: self.values[-len(values) :] == list(values))

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled(), self._task


def encoded(text: str) -> str:
    """As etcd's JSON has keys and values."""
    return base64.b64encode(text.encode()).decode()
