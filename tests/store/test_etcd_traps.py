"""The etcd client and store against what etcd does to those who trust it, one trap at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.etcd import EtcdCluster
from harness.line import Line
from store.terms import ME, RECORD, WAIT_S, begin, encoded, eventually
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
        versions = cluster.ask("kv/range", {"key": encoded("/stretto/jobs/a")})["kvs"][0]["version"]
        assert versions == "1"
        await store.close()
        terms.clear()


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
    versions = shared.ask("kv/range", {"key": encoded("/ambiguous/jobs/a")})["kvs"][0]["version"]
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
