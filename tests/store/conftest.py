"""What tests of stores share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from stretto_controller.store.etcd.store import EtcdStore


@pytest.fixture
async def terms() -> AsyncIterator[list[EtcdStore]]:
    stores: list[EtcdStore] = []
    yield stores
    for store in stores:
        await store.close()
