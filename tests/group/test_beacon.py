"""Beacons and watches, in one process: real sockets, no torch."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from stretto.group.beacon import Beacon
from stretto.group.standing import Standing, unpack
from stretto.group.watch import Watch

LIMIT_S = 10.0


@pytest.fixture
def beacon() -> Iterator[Beacon]:
    beacon = Beacon("job", "127.0.0.1")
    yield beacon
    beacon.close()


def eventually(watch: Watch, holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"numbers {watch.numbers()}, gone {watch.gone()}"
        watch.wait(0.05)


def test_a_watch_hears_the_standing_at_once_and_each_change(beacon: Beacon) -> None:
    beacon.announce(3)
    watch = beacon.watch(4, {1: ("127.0.0.1", beacon.port)})
    eventually(watch, lambda: watch.numbers() == {1: 3})
    beacon.announce(4)
    eventually(watch, lambda: watch.numbers() == {1: 4})
    beacon.announce(-4)
    eventually(watch, lambda: watch.numbers() == {1: -4})
    assert watch.gone() == {}


def test_what_is_published_reaches_the_same_generation_only(beacon: Beacon) -> None:
    ends = {1: ("127.0.0.1", beacon.port)}
    older, current = beacon.watch(4, ends), beacon.watch(5, ends)
    beacon.announce(5)
    beacon.publish(5, "key/1", b"first")
    beacon.publish(5, "key/2", bytes(1000))
    eventually(current, lambda: current.published("key/2") == bytes(1000))
    assert current.published("key/1") == b"first"
    assert older.published("key/1") is None
    beacon.announce(6)
    late = beacon.watch(6, ends)
    eventually(late, lambda: late.numbers() == {1: 6})
    assert late.published("key/1") is None


def test_a_closed_beacon_is_gone(beacon: Beacon) -> None:
    other = Beacon("job", "127.0.0.1")
    watch = beacon.watch(1, {1: ("127.0.0.1", other.port)})
    eventually(watch, lambda: 1 in watch.numbers())
    other.close()
    eventually(watch, lambda: watch.gone() == {1: "its process ended"})


def test_a_port_where_nobody_listens_is_gone(beacon: Beacon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    watch = beacon.watch(1, {1: ("127.0.0.1", port)})
    eventually(watch, lambda: "refused" in watch.gone().get(1, ""))


def test_another_jobs_worker_is_not_taken_for_a_peer(beacon: Beacon) -> None:
    stranger = Beacon("another job", "127.0.0.1")
    watch = beacon.watch(1, {1: ("127.0.0.1", stranger.port)})
    eventually(watch, lambda: watch.gone() == {1: "somebody else answered in its place"})
    assert watch.numbers() == {}
    stranger.close()


def test_a_roll_call_names_who_is_silent_and_returns_early_when_all_answer(beacon: Beacon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts; nobody answers
        ends = {1: ("127.0.0.1", beacon.port), 2: ("127.0.0.1", silent.getsockname()[1])}
        watch = beacon.watch(1, ends)
        eventually(watch, lambda: 1 in watch.numbers())
        assert watch.roll_call(0.1) == {2: "did not answer within 0.1 s"}
        alone = beacon.watch(1, {1: ends[1]})
        eventually(alone, lambda: 1 in alone.numbers())
        began_s = time.monotonic()
        assert alone.roll_call(LIMIT_S) == {}
        assert time.monotonic() - began_s < LIMIT_S / 2


def test_works_over_ipv6() -> None:
    beacon = Beacon("job", "::1")
    watch = beacon.watch(1, {1: ("::1", beacon.port)})
    eventually(watch, lambda: watch.numbers() == {1: 0})
    beacon.close()


def test_a_standing_survives_any_cut_of_the_stream_into_pieces() -> None:
    standing = Standing(-7, {"a/0": b"x" * 300, "": b""})
    message = standing.pack(b"i" * 16)
    for size in range(len(message)):
        assert unpack(message[:size], b"i" * 16) == (None, message[:size])
    assert unpack(message + b"rest", b"i" * 16) == (standing, b"rest")
    with pytest.raises(ValueError, match="not a standing"):
        unpack(message, b"j" * 16)
