"""The controller collects all garbage at moments of its own choosing, and then really does."""

from __future__ import annotations

import asyncio
import gc
import weakref

from stretto_controller.garbage import collect_on


class _Knot:
    def __init__(self) -> None:
        self.itself = self


async def test_full_collections_come_when_asked_for_and_at_no_other_time() -> None:
    before = gc.get_threshold()
    collector = asyncio.create_task(collect_on(0.01))
    await asyncio.sleep(0)
    assert gc.get_threshold()[2] > 100_000
    knot = weakref.ref(_Knot())
    async with asyncio.timeout(60):
        while knot() is not None:
            await asyncio.sleep(0.005)
    collector.cancel()
    await asyncio.wait([collector])
    assert gc.get_threshold() == before
