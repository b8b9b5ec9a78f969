"""A watch of etcd sees every change, whatever becomes of the member that it asks and of the history that it needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from harness.etcd import EtcdCluster
from store.terms import WAIT_S, Watched, encoded, eventually
from stretto_controller.store.etcd.connection import (
    Connection,
)
from stretto_proto.v1 import etcd_pb2 as etcd


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


def _put_elsewhere(cluster: EtcdCluster, key: str, value: str, node: int = 1) -> None:
    """As soon as those that are left have a leader."""
    deadline_s = time.monotonic() + WAIT_S
    body = {"key": encoded(key), "value": encoded(value)}
    while True:
        try:
            cluster.ask("kv/put", body, node=node)
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        else:
            return
