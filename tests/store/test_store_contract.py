"""What every store keeps to, in SQLite's file and in a real etcd: lossless, whole saves, in the order asked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness.etcd import EtcdCluster
from stretto_controller.core.model import Cause, Generation, JobSpec, Member, Node, Record
from stretto_controller.curve import Point
from stretto_controller.store.contents import (
    GenerationSummary,
    Leader,
    Marks,
    Save,
    Store,
    Stored,
    StoredEvent,
    StoredJob,
    StoreError,
)
from stretto_controller.store.etcd.store import EtcdStore
from stretto_controller.store.sqlite import SqliteStore

SPEC = JobSpec(min_nodes=1, max_nodes=4)


def event(sequence: int) -> StoredEvent:
    return StoredEvent(sequence, 1.5, "node_joined", f"reason {sequence}\nin two lines", "n0", 3)


def summary(number: int, incarnation: int = 1) -> GenerationSummary:
    member = Member("n0", 0, 2, 0, "127.0.0.1")
    return GenerationSummary(incarnation, Generation(number, (member,), 2.0, "why"), Cause.GROW, started_s=7.0)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


class Terms:
    """One store after the other in the same place."""

    def __init__(self, directory: Path, etcd: EtcdCluster | None, prefix: str) -> None:
        self._directory = directory
        self._etcd = etcd
        self._prefix = prefix
        self.store: Store | None = None
        self.stored = Stored()

    async def begin(self, *, kept_events: int = 100, kept_generations: int = 100) -> Store:
        """Close the store, if one is open, and open the next; `stored` is what it loads."""
        await self.end()
        if self._etcd is None:
            self.store = SqliteStore(self._directory, kept_events=kept_events, kept_generations=kept_generations)
        else:
            settings = self._etcd.settings(prefix=self._prefix)
            self.store = EtcdStore(settings, kept_events=kept_events, kept_generations=kept_generations)
        await self.store.lead(Leader("127.0.0.1:1", "http://127.0.0.1:2"))
        self.stored = await self.store.load()
        return self.store

    async def end(self) -> None:
        if self.store is not None:
            await self.store.close()
            self.store = None

    async def loads(self, **kept: int) -> tuple[StoredJob, ...]:
        await self.begin(**kept)
        return self.stored.jobs


@pytest.fixture(params=["sqlite", "etcd"])
async def terms(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Terms]:
    etcd = request.getfixturevalue("etcd") if request.param == "etcd" else None
    terms = Terms(tmp_path, etcd, f"/{request.node.name}/")
    yield terms
    await terms.end()


async def test_an_empty_store_has_no_jobs(terms: Terms) -> None:
    store = await terms.begin()
    assert terms.stored == Stored()
    assert store.leads()
    assert not store.lost.is_set()


async def test_what_was_saved_is_loaded_by_the_next_controller(terms: Terms) -> None:
    store = await terms.begin()
    record = Record("a", SPEC, nodes={"n0": Node("n0", "hash", 2, "::1", 0)})
    await store.save(Save("a", record, Marks(checkpoint_s=5.0), (event(1), event(2)), (summary(1),)))
    (job,) = await terms.loads()
    assert job == StoredJob(record, Marks(checkpoint_s=5.0), (event(1), event(2)), (summary(1),))


async def test_saves_that_share_a_commit_keep_their_order_and_all_their_events(terms: Terms) -> None:
    store = await terms.begin()
    record = Record("a", SPEC)
    saves = [
        store.save(Save("a", replace(record, next_order=n), events=(event(n),), generations=(summary(1),)))
        for n in range(1, 51)
    ]
    saves.append(store.save(Save("b", Record("b", SPEC), events=(event(51),))))
    await asyncio.gather(*saves)
    a, b = await terms.loads()
    assert a.record.next_order == 50
    assert [e.sequence for e in a.events] == list(range(1, 51))
    assert b.record.name == "b"


async def test_saves_of_many_jobs_at_once_all_arrive(terms: Terms) -> None:
    store = await terms.begin()
    names = [f"job-{n:03}" for n in range(100)]
    await asyncio.gather(
        *(store.save(Save(name, Record(name, SPEC), events=(event(n),))) for n, name in enumerate(names, start=1))
    )
    assert [(job.record.name, job.events) for job in await terms.loads()] == [
        (name, (event(n),)) for n, name in enumerate(names, start=1)
    ]


async def test_records_of_large_jobs_are_kept_whole(terms: Terms) -> None:
    store = await terms.begin()
    nodes = {f"n{i}": Node(f"n{i}", "h" * 64, 8, "host.example.org", i) for i in range(512)}
    saves = [Save(name, Record(name, SPEC, nodes=nodes)) for name in ("a", "b", "c", "d", "e", "f")]
    await asyncio.gather(*map(store.save, saves))
    assert {job.record.name: len(job.record.nodes) for job in await terms.loads()} == dict.fromkeys("abcdef", 512)


async def test_a_forgotten_job_is_gone_and_its_name_free_within_one_commit(terms: Terms) -> None:
    store = await terms.begin()
    await asyncio.gather(
        store.save(Save("a", Record("a", SPEC), events=(event(1),), generations=(summary(1),))),
        store.save(Save("a", forget=True)),
        store.save(Save("a", Record("a", SPEC, reason="again"), events=(event(2),))),
        store.save(Save("ab", Record("ab", SPEC))),
    )
    job, other = await terms.loads()
    assert job.record.reason == "again"
    assert job.events == (event(2),)
    assert job.generations == ()
    assert terms.store is not None
    await terms.store.save(Save("a", forget=True))
    assert await terms.loads() == (other,)


async def test_sequence_numbers_of_forgotten_events_are_not_given_out_again(terms: Terms) -> None:
    store = await terms.begin()
    await store.save(Save("a", Record("a", SPEC), events=(event(41), event(42))))
    await store.save(Save("a", forget=True))
    assert await terms.loads() == ()
    assert terms.stored.last_sequence == 42


async def test_keeps_only_the_newest_events_and_generations(terms: Terms) -> None:
    store = await terms.begin(kept_events=3, kept_generations=2)
    await store.save(Save("other", Record("other", SPEC), events=(event(1),)))
    for n in range(2, 12):
        await store.save(Save("a", Record("a", SPEC), events=(event(n),), generations=(summary(n, n // 6 + 1),)))
    a, other = await terms.loads(kept_events=3, kept_generations=2)
    assert [e.sequence for e in a.events] == [9, 10, 11]
    assert [g.generation.number for g in a.generations] == [10, 11]
    assert len(other.events) == 1
    # The next term goes on where this one was.
    assert terms.store is not None
    await terms.store.save(Save("a", Record("a", SPEC), events=(event(12),), generations=(summary(12, 2),)))
    a, _ = await terms.loads(kept_events=3, kept_generations=2)
    assert [e.sequence for e in a.events] == [10, 11, 12]
    assert [g.generation.number for g in a.generations] == [11, 12]


async def test_an_ended_generation_replaces_itself_begun(terms: Terms) -> None:
    store = await terms.begin()
    await store.save(Save("a", Record("a", SPEC), generations=(summary(1),)))
    ended = replace(summary(1), ended_s=9.0, end_reason="over")
    await store.save(Save("a", generations=(ended, summary(2))))
    (job,) = await terms.loads()
    assert job.generations == (ended, summary(2))


def points(first: int, last: int) -> tuple[Point, ...]:
    return tuple(Point(float(n), 1, n, n, 1.5, 2.0, math.nan, math.inf, 0.1, 3.0) for n in range(first, last))


async def test_a_curve_is_saved_piece_by_piece_or_anew_and_goes_with_its_job(terms: Terms) -> None:
    store = await terms.begin()
    await store.save(Save("a", Record("a", SPEC), points=points(0, 3)))
    await store.save(Save("a", points=points(2, 5)))
    await store.save(Save("b", Record("b", SPEC), points=points(0, 9)))
    await asyncio.gather(
        store.save(Save("b", points=points(9, 10))),
        store.save(Save("b", points=points(0, 4), points_anew=True)),
        store.save(Save("b", points=points(4, 6))),
    )
    found = {job.record.name: job.points for job in await terms.loads()}
    # By their text: NaN is not equal to itself.
    assert repr(found["a"]) == repr(tuple(Point(*map(float, point)) for point in points(0, 5)))
    assert [point.step for point in found["b"]] == [0, 1, 2, 3, 4, 5]
    assert terms.store is not None
    await terms.store.save(Save("b", forget=True))
    await terms.store.save(Save("b", Record("b", SPEC)))
    assert [len(job.points) for job in await terms.loads()] == [5, 0]


async def test_closing_first_writes_what_waits(terms: Terms) -> None:
    store = await terms.begin()
    saves = [store.save(Save("a", Record("a", SPEC, next_order=n))) for n in range(20)]
    await terms.end()
    assert [save.exception() for save in saves] == [None] * 20
    (job,) = await terms.loads()
    assert job.record.next_order == 19


async def test_after_a_failed_save_nothing_more_is_saved(terms: Terms) -> None:
    store = await terms.begin()
    await store.save(Save("a", Record("a", SPEC)))
    with pytest.raises(StoreError, match="cannot save"):
        # A record that no codec knows how to write.
        await store.save(Save("a", object()))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(StoreError, match="cannot save"):
        await store.save(Save("a", Record("a", SPEC, reason="later")))
    (job,) = await terms.loads()
    assert job.record.reason == ""
