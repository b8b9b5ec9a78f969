"""One of several operators acts, and no two at once."""

from __future__ import annotations

import pytest
from etj.memory_server import Call, MemoryServer
from stretto_operator.election import Election, LeaseSettings
from stretto_operator.server import ApiError


class Clock:
    """Seconds that move when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> MemoryServer:
    return MemoryServer(clock)


def _election(server: MemoryServer, clock: Clock, identity: str) -> Election:
    return Election(server, LeaseSettings("default", "stretto-operator", identity, duration_s=15), clock)


async def test_the_first_leads_and_the_second_waits(server: MemoryServer, clock: Clock) -> None:
    first, second = _election(server, clock, "first"), _election(server, clock, "second")
    assert await first.attempt()
    assert not await second.attempt()
    assert first.leads
    assert not second.leads


async def test_who_does_not_renew_stops_before_another_begins(server: MemoryServer, clock: Clock) -> None:
    first, second = _election(server, clock, "first"), _election(server, clock, "second")
    await first.attempt()
    await second.attempt()
    both = []
    for _ in range(40):
        clock.now_s += 0.5
        await second.attempt()
        both.append((first.leads, second.leads))
    assert (True, True) not in both
    assert both[-1] == (False, True)


async def test_who_renews_keeps_the_lead(server: MemoryServer, clock: Clock) -> None:
    first, second = _election(server, clock, "first"), _election(server, clock, "second")
    await first.attempt()
    for _ in range(20):
        clock.now_s += 5
        assert await first.attempt()
        assert not await second.attempt()


async def test_who_resigns_is_followed_at_once(server: MemoryServer, clock: Clock) -> None:
    first, second = _election(server, clock, "first"), _election(server, clock, "second")
    await first.attempt()
    assert not await second.attempt()
    await first.resign()
    assert await second.attempt()
    assert not first.leads


async def test_a_lease_that_another_took_meanwhile_is_lost(server: MemoryServer, clock: Clock) -> None:
    first, second = _election(server, clock, "first"), _election(server, clock, "second")
    await first.attempt()
    await second.attempt()
    clock.now_s += 16
    assert await second.attempt()
    assert not await first.attempt()
    assert not first.leads


async def test_an_api_server_that_is_away_ends_the_lead_in_time(server: MemoryServer, clock: Clock) -> None:
    first = _election(server, clock, "first")
    await first.attempt()

    def away(call: Call) -> None:
        raise ApiError(0, "NoAnswer", "away")

    server.before = away
    clock.now_s += 9
    assert not await first.attempt()
    assert first.leads
    clock.now_s += 2
    assert not first.leads
