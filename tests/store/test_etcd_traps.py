"""The etcd client and store against what etcd does to those who trust it, one trap at a time."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.etcd import EtcdCluster
from harness.line import Line
from store.terms import ME, RECORD, WAIT_S, Watched, begin, eventually
from stretto_controller.core.model import Record
from stretto_controller.settings import EtcdSettings
from stretto_controller.store.contents import Leader, Save, StoreError
from stretto_controller.store.etcd.connection import (
    LEASE_REVOKE,
    RANGE,
    TXN,
    Connection,
    EtcdRefusedError,
    EtcdUnavailableError,
    Method,
)
from stretto_controller.store.etcd.store import EtcdStore
from stretto_proto.v1 import etcd_pb2 as etcd


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
async def connection(shared: EtcdCluster) -> AsyncIterator[Connection]:
    # A watch that is never begun again by itself: only what these tests do ends it.
    connection = Connection(shared.settings(watch_quiet_s=600.0))
    yield connection
    await connection.close()


async def test_a_key_is_followed_from_its_present_value_through_every_change(
    shared: EtcdCluster, connection: Connection
) -> None:
    shared.put("/w/each", "1")
    watched = Watched(connection, "/w/each")
    await watched.sees("1")
    for value in ("2", "3"):
        shared.put("/w/each", value)
    shared.delete("/w/each")
    shared.put("/w/each", "4")
    await eventually(lambda: len(watched.values) == 5)
    assert watched.values == ["1", "2", "3", None, "4"]
    await watched.end()


async def test_changes_of_other_keys_do_not_hide_one_that_came_before_the_watch_resumed(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path) as cluster:
        connection = Connection(cluster.settings(watch_quiet_s=600.0))
        cluster.put("/w", "1")
        watched = Watched(connection, "/w")
        await watched.sees("1")
        cluster.put("/w", "2")
        await watched.sees("2")
        cluster.put("/other", "x")
        cluster.kill(0)
        cluster.start(0)
        await asyncio.to_thread(cluster.await_healthy)
        cluster.put("/w", "3")
        await watched.sees("1", "2", "3")
        await watched.end()
        await connection.close()


async def test_a_watch_whose_place_was_compacted_goes_on_with_the_present_value(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path) as cluster:
        connection = Connection(cluster.settings(watch_quiet_s=600.0))
        cluster.put("/w", "1")
        watched = Watched(connection, "/w")
        await watched.sees("1")
        cluster.freeze(0)
        # While the watch cannot be told: nothing may be lost of what follows. Its channel breaks with the kill.
        cluster.kill(0)
        cluster.start(0)
        await asyncio.to_thread(_change_and_compact, cluster)
        await watched.sees("9")
        cluster.put("/w", "10")
        await watched.sees("9", "10")
        await watched.end()
        await connection.close()


def _change_and_compact(cluster: EtcdCluster) -> None:
    cluster.await_healthy()
    for value in range(2, 10):
        cluster.put("/w", str(value))
    cluster.compact()


async def test_a_watch_that_asks_for_a_compacted_revision_is_told_so_and_goes_on(
    shared: EtcdCluster, connection: Connection
) -> None:
    revision = shared.put("/w/old", "1")
    shared.put("/w/old", "2")
    shared.compact()
    responses = connection._watch(b"/w/old", revision)
    cancelled = [response async for response in _until_cancelled(responses)]
    assert cancelled[-1].compact_revision > revision
    watched = Watched(connection, "/w/old")
    await watched.sees("2")
    await watched.end()


async def _until_cancelled(responses: Any) -> AsyncIterator[etcd.EtcdWatchResponse]:
    async with aclosing(responses), asyncio.timeout(WAIT_S):
        async for response in responses:
            yield response
            if response.canceled:
                return


async def test_a_watch_on_a_member_that_froze_moves_to_another(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path, 3) as cluster:
        connection = Connection(cluster.settings(watch_quiet_s=1.0))
        cluster.put("/w", "1")
        watched = Watched(connection, "/w")
        await watched.sees("1")
        cluster.freeze(0)
        await asyncio.to_thread(_put_elsewhere, cluster, "/w", "2")
        await watched.sees("2")
        cluster.thaw(0)
        await watched.end()
        await connection.close()


async def test_a_watch_on_etcd_s_leader_goes_on_when_that_is_killed(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path, 3) as cluster:
        killed = await asyncio.to_thread(cluster.leader)
        endpoints = ",".join(cluster.endpoint((killed + step) % 3) for step in range(3))
        connection = Connection(cluster.settings(endpoints=endpoints, watch_quiet_s=600.0))
        cluster.put("/w", "1")
        watched = Watched(connection, "/w")
        await watched.sees("1")
        cluster.put("/w", "2")
        await watched.sees("2")
        cluster.kill(killed)
        survivor = (killed + 1) % 3
        for value in ("3", "4", "5"):
            await asyncio.to_thread(_put_elsewhere, cluster, "/w", value, survivor)
        await watched.sees("5")
        assert watched.values == ["1", "2", "3", "4", "5"], "each change once, in order, through the break"
        await watched.end()
        await connection.close()


async def test_a_transaction_whose_answer_never_comes_is_done_once(tmp_path: Path, terms: list[EtcdStore]) -> None:
    """On the wire: etcd carries it out, and nothing of that comes back."""
    with EtcdCluster(tmp_path) as cluster, Line(cluster.endpoint(0)) as line:
        store = await begin(cluster.settings(endpoints=line.endpoint, lease_s=60), terms)
        line.cut(answers_only=True)
        saved = store.save(Save("a", RECORD))
        await eventually(lambda: cluster.get("/stretto/jobs/a") is not None)
        assert not saved.done()
        line.heal()
        async with asyncio.timeout(WAIT_S):
            await saved
            await store.save(Save("b", RECORD))
        versions = cluster.ask("kv/range", {"key": _base64("/stretto/jobs/a")})["kvs"][0]["version"]
        assert versions == "1"
        await store.close()
        terms.clear()


def _put_elsewhere(cluster: EtcdCluster, key: str, value: str, node: int = 1) -> None:
    """As soon as those that are left have a leader."""
    deadline_s = time.monotonic() + WAIT_S
    body = {"key": _base64(key), "value": _base64(value)}
    while True:
        try:
            cluster.ask("kv/put", body, node=node)
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        else:
            return


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def test_saves_go_on_when_etcd_s_own_leader_is_killed(tmp_path: Path, terms: list[EtcdStore]) -> None:
    with EtcdCluster(tmp_path, 3) as cluster:
        # The lease outlives etcd's own election, however slow the machine is.
        store = await begin(cluster.settings(lease_s=60), terms)
        await store.save(Save("a", RECORD))
        killed = await asyncio.to_thread(cluster.leader)
        cluster.kill(killed)
        async with asyncio.timeout(WAIT_S):
            await store.save(Save("b", RECORD))
        assert store.leads()
        cluster.start(killed)
        await asyncio.to_thread(cluster.await_healthy)
        await store.save(Save("c", RECORD))
        await store.close()
        terms.clear()
        again = await begin(cluster.settings(), terms)
        await again.close()
        terms.clear()


async def test_saves_wait_while_etcd_is_restarted_and_compacted(tmp_path: Path, terms: list[EtcdStore]) -> None:
    with EtcdCluster(tmp_path) as cluster:
        store = await begin(cluster.settings(lease_s=60), terms)
        await store.save(Save("a", RECORD))
        cluster.kill(0)
        saved = store.save(Save("b", RECORD))
        await asyncio.sleep(0)
        cluster.start(0)
        await asyncio.to_thread(cluster.await_healthy)
        await asyncio.to_thread(cluster.compact)
        async with asyncio.timeout(WAIT_S):
            await saved
            await store.save(Save("c", RECORD))
        await store.close()
        terms.clear()
        later = EtcdStore(cluster.settings(), kept_events=10, kept_generations=10)
        await later.lead(ME)
        assert [job.record.name for job in (await later.load()).jobs] == ["a", "a", "a"]
        await later.close()


class Meddling:
    """Stands before a store's connection, and lets answers to transactions get lost."""

    def __init__(self, store: EtcdStore) -> None:
        self._ask = store._connection.ask
        self.before: Callable[[], Awaitable[None]] | None = None
        self.lost_answers = 0
        self.late: list[etcd.EtcdTxnRequest] = []
        self.hold = 0
        store._connection.ask = self.ask  # type: ignore[method-assign]  # what a network does, at a chosen moment

    async def ask(self, method: Method, request: Any, timeout_s: float | None = None) -> Any:
        if method is TXN and self.hold:
            self.hold -= 1
            self.late.append(request)
            raise EtcdUnavailableError("the request is slow")
        answer = await self._ask(method, request, timeout_s)
        if method is TXN and self.lost_answers:
            self.lost_answers -= 1
            raise EtcdUnavailableError("the answer was lost")
        return answer

    async def arrive(self) -> list[bool]:
        """The slow requests reach etcd now."""
        return [(await self._ask(TXN, request)).succeeded for request in self.late]


async def test_a_save_whose_answer_is_lost_is_done_once(shared: EtcdCluster, terms: list[EtcdStore]) -> None:
    store = await begin(shared.settings(prefix="/ambiguous/"), terms)
    meddling = Meddling(store)
    meddling.lost_answers = 2
    await store.save(Save("a", RECORD))
    assert store.leads()
    versions = shared.ask("kv/range", {"key": _base64("/ambiguous/jobs/a")})["kvs"][0]["version"]
    assert versions == "1"
    await store.save(Save("b", RECORD))


async def test_a_save_that_arrives_late_after_its_repetition_changes_nothing(
    shared: EtcdCluster, terms: list[EtcdStore]
) -> None:
    store = await begin(shared.settings(prefix="/late/"), terms)
    meddling = Meddling(store)
    meddling.hold = 1
    await store.save(Save("a", Record("a", RECORD.spec, reason="first")))
    await store.save(Save("a", Record("a", RECORD.spec, reason="second")))
    assert await meddling.arrive() == [False]
    assert "second" in str(shared.get("/late/jobs/a"))
    await store.save(Save("b", RECORD))


async def test_a_save_of_an_earlier_term_that_arrives_late_changes_nothing(
    shared: EtcdCluster, terms: list[EtcdStore]
) -> None:
    store = await begin(shared.settings(prefix="/term/"), terms)
    meddling = Meddling(store)
    meddling.hold = 10**6
    saved = store.save(Save("a", RECORD))
    await eventually(lambda: bool(meddling.late))
    await store._connection.ask(LEASE_REVOKE, etcd.EtcdLeaseRevokeRequest(id=_lease_id(store)))
    other = await begin(shared.settings(prefix="/term/"), terms)
    assert not any(await meddling.arrive())
    assert shared.get("/term/jobs/a") is None
    with pytest.raises(StoreError, match="does not lead any more"):
        await saved
    assert store.lost.is_set()
    assert other.leads()


def _lease_id(store: EtcdStore) -> int:
    lease = store._election._lease
    assert lease is not None
    return lease.id


async def test_a_leader_whose_lease_was_revoked_saves_nothing_and_knows_it(
    shared: EtcdCluster, terms: list[EtcdStore]
) -> None:
    store = await begin(shared.settings(prefix="/revoked/"), terms)
    await store._connection.ask(LEASE_REVOKE, etcd.EtcdLeaseRevokeRequest(id=_lease_id(store)))
    with pytest.raises(StoreError, match="does not lead any more"):
        await store.save(Save("a", RECORD))
    assert (store.lost.is_set(), store.leads()) == (True, False)
    assert shared.get("/revoked/jobs/a") is None


async def test_a_lease_that_is_not_renewed_ends_by_our_own_clock(tmp_path: Path, terms: list[EtcdStore]) -> None:
    with EtcdCluster(tmp_path) as cluster:
        store = await begin(cluster.settings(lease_s=2), terms)
        cluster.freeze(0)
        async with asyncio.timeout(WAIT_S):
            await store.lost.wait()
        assert not store.leads()
        assert "could not be renewed for 2 s" in store.lost_reason
        with pytest.raises(StoreError, match="does not lead any more"):
            await store.save(Save("a", RECORD))
        cluster.thaw(0)
        await store.close()
        terms.clear()


async def test_only_one_of_several_leads_and_the_next_follows_at_once_when_it_resigns(
    shared: EtcdCluster, terms: list[EtcdStore]
) -> None:
    settings = shared.settings(prefix="/one/")
    first = await begin(settings, terms)
    second = EtcdStore(settings, kept_events=10, kept_generations=10)
    terms.append(second)
    waiting = asyncio.create_task(second.lead(Leader("127.0.0.1:2", "http://127.0.0.1:3")))
    await eventually(lambda: second.leader == ME)
    assert not waiting.done()
    await first.save(Save("a", RECORD))
    await first.close()
    terms.remove(first)
    async with asyncio.timeout(WAIT_S):
        await waiting
    assert [job.record for job in (await second.load()).jobs] == [RECORD]


async def test_something_else_that_writes_under_the_prefix_ends_the_term(
    shared: EtcdCluster, terms: list[EtcdStore]
) -> None:
    store = await begin(shared.settings(prefix="/foreign/"), terms)
    shared.put("/foreign/last_save", "somebody")
    with pytest.raises(StoreError, match="give this cluster a prefix of its own"):
        await store.save(Save("a", RECORD))
    assert store.lost.is_set()


async def test_a_dead_endpoint_is_passed_over(shared: EtcdCluster) -> None:
    connection = Connection(EtcdSettings(endpoints=f"127.0.0.1:1,{shared.endpoints}"))
    answer = await connection.call(RANGE, etcd.EtcdRangeRequest(key=b"x"))
    assert answer.header.revision > 0
    await connection.close()


async def test_what_etcd_refuses_is_not_asked_again(shared: EtcdCluster, connection: Connection) -> None:
    with pytest.raises(EtcdRefusedError, match="key is not provided") as error:
        await connection.call(RANGE, etcd.EtcdRangeRequest())
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_store_larger_than_a_page_is_read_whole_though_it_is_compacted_meanwhile(
    shared: EtcdCluster, terms: list[EtcdStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = shared.settings(prefix="/pages/")
    store = await begin(settings, terms)
    names = [f"j{n:02}" for n in range(40)]
    await asyncio.gather(*(store.save(Save(name, Record(name, RECORD.spec))) for name in names))
    await store.close()
    terms.clear()
    monkeypatch.setattr("stretto_controller.store.etcd.store._PAGE_LENGTH", 7)
    later = EtcdStore(settings, kept_events=10, kept_generations=10)
    terms.append(later)
    await later.lead(ME)
    call = later._connection.call
    asked = 0

    async def compacting(method: Method, request: Any, limit_s: float | None = None) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            shared.put("/pages2", json.dumps(asked))
            shared.compact()
        return await call(method, request, limit_s)

    later._connection.call = compacting  # type: ignore[method-assign]  # a compaction at a chosen moment
    assert [job.record.name for job in (await later.load()).jobs] == names
    assert asked > 7
