"""A whole operator on an API server in memory: watches that break, two at once, an end in good order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from etj.etj_site import manifest
from etj.memory_server import Call, MemoryServer
from stretto_operator import names
from stretto_operator.cache import Cache
from stretto_operator.election import LeaseSettings
from stretto_operator.operator_process import OperatorProcess
from stretto_operator.queue import Queue
from stretto_operator.server import POD, ApiError
from stretto_operator.settings import Settings
from stretto_operator.surroundings import Surroundings

_LIMIT_S = 60.0


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(time.time)


def _settings(lease: str = "") -> Settings:
    # Nobody is there: pods are made all the same.
    endpoint = "127.0.0.1:1"
    held = LeaseSettings("default", "stretto-operator", lease, duration_s=3) if lease else None
    return Settings(endpoint, Surroundings(endpoint), lease=held)


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while not what():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def _running(server: MemoryServer, lease: str = "") -> AsyncIterator[OperatorProcess]:
    process = OperatorProcess(server, _settings(lease))
    task = asyncio.create_task(process.run())
    try:
        yield process
    finally:
        process.stop()
        await asyncio.wait_for(task, _LIMIT_S)


async def test_jobs_from_before_and_from_later_get_their_pods(server: MemoryServer) -> None:
    server.add(manifest("early"))
    async with _running(server):
        await _until(lambda: "early-0" in server.all("Pod"))
        server.add(manifest("late", nodes=2))
        await _until(lambda: "late-1" in server.all("Pod"))
        server.remove("Pod", "late-0")
        await _until(lambda: "late-0" in server.all("Pod"))


async def test_a_watch_that_expired_lists_again(server: MemoryServer) -> None:
    refused: list[Call] = []

    def expire(call: Call) -> None:
        if call.verb == "watch" and len(refused) < 6:
            refused.append(call)
            raise ApiError(410, "Expired", "too old resource version")

    server.before = expire
    async with _running(server):
        await _until(lambda: len(refused) == 6)
        server.add(manifest("digits"))
        await _until(lambda: "digits-0" in server.all("Pod"))
    assert len([call for call in server.calls if call.verb == "list"]) > 3


async def test_an_api_server_that_was_away_is_used_again(server: MemoryServer) -> None:
    away = [True]

    def answer(call: Call) -> None:
        if away[0]:
            raise ApiError(0, "NoAnswer", "connection refused")

    server.before = answer
    server.add(manifest("digits"))
    async with _running(server):
        await _until(lambda: len(server.calls) > 6)
        away[0] = False
        await _until(lambda: "digits-0" in server.all("Pod"))


async def test_of_two_one_acts_and_the_other_follows_it(server: MemoryServer) -> None:
    def holder() -> str:
        leases = server.all("Lease")
        return str(leases["stretto-operator"]["spec"]["holderIdentity"]) if leases else ""

    async with _running(server, "second"):
        await _until(lambda: holder() == "second")
        async with _running(server, "first"):
            server.add(manifest("digits"))
            await _until(lambda: "digits-0" in server.all("Pod"))
            assert holder() == "second"
    assert holder() == ""
    creations = [call for call in server.calls if call.verb == "create" and call.kind is POD]
    assert len(creations) == 1


async def test_an_operator_that_lost_the_lead_ends(server: MemoryServer) -> None:
    process = OperatorProcess(server, _settings("first"))
    task = asyncio.create_task(process.run())
    await _until(lambda: bool(server.all("Lease")))
    server.change("Lease", "stretto-operator", spec={"holderIdentity": "somebody"})
    assert await asyncio.wait_for(task, _LIMIT_S) is False


async def test_a_key_that_is_added_while_it_is_held_comes_again() -> None:
    queue = Queue()
    queue.add(("default", "a"))
    assert await queue.take() == ("default", "a")
    queue.add(("default", "a"))
    assert not queue.waits
    queue.done(("default", "a"))
    assert queue.waits


async def test_the_earliest_appointment_stands() -> None:
    queue = Queue()
    queue.add_later(("default", "a"), 0.0)
    queue.add_later(("default", "a"), 1000.0)
    assert await asyncio.wait_for(queue.take(), _LIMIT_S) == ("default", "a")
    queue.add_later(("default", "b"), 1000.0)
    queue.add_later(("default", "b"), 0.0)
    assert await asyncio.wait_for(queue.take(), _LIMIT_S) == ("default", "b")
    queue.close()


def test_an_older_answer_changes_no_cache_and_brings_nothing_back() -> None:
    told: list[tuple[str, str]] = []
    cache = Cache(POD, told.append)

    def pod(version: int, uid: str = "u") -> dict[str, object]:
        labels = {names.JOB_LABEL: "digits"}
        metadata = {"name": "p", "namespace": "d", "uid": uid, "resourceVersion": str(version), "labels": labels}
        return {"kind": "Pod", "metadata": metadata}

    cache.put(pod(5))
    cache.put(pod(4))
    assert cache.get(("d", "p")) == pod(5)
    cache.remove(pod(6))
    cache.put(pod(5))
    assert cache.get(("d", "p")) is None
    cache.put(pod(7, "v"))
    cache.remove(pod(8, "u"))
    assert cache.get(("d", "p")) == pod(7, "v")
    assert told == [("d", "digits")] * 3
