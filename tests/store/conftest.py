"""What tests of stores share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from harness.etcd import EtcdCluster
from stretto_controller.store.etcd.connection import Connection
from stretto_controller.store.etcd.store import EtcdStore


@pytest.fixture
async def terms() -> AsyncIterator[list[EtcdStore]]:
    stores: list[EtcdStore] = []
    yield stores
    for store in stores:
        await store.close()


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
