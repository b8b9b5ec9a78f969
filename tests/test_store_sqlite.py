"""The SQLite store: lossless, whole saves, and every acknowledged save survives kill -9."""

from __future__ import annotations

import asyncio
import math
import random
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stretto_controller.core.model import (
    Cause,
    Change,
    Generation,
    JobSpec,
    Member,
    Node,
    NodeState,
    Phase,
    Ready,
    Record,
)
from stretto_controller.core.report import Checkpoint
from stretto_controller.curve import Point
from stretto_controller.store.codec import CodecError, decode, encode
from stretto_controller.store.contents import GenerationSummary, Marks, Save, StoredEvent, StoreError
from stretto_controller.store.sqlite import SCHEMA_VERSION, SqliteStore

SPEC = JobSpec(min_nodes=1, max_nodes=4)


def open_store(directory: Path, *, kept_events: int = 100, kept_generations: int = 100) -> SqliteStore:
    return SqliteStore(directory, kept_events=kept_events, kept_generations=kept_generations)


def event(sequence: int) -> StoredEvent:
    return StoredEvent(sequence, 1.5, "node_joined", f"reason {sequence}", "n0", 3)


def summary(number: int, incarnation: int = 1) -> GenerationSummary:
    member = Member("n0", 0, 2, 0, "127.0.0.1")
    return GenerationSummary(incarnation, Generation(number, (member,), 2.0, "why"), Cause.GROW, started_s=7.0)


records = st.builds(
    Record,
    name=st.text(),
    spec=st.from_type(JobSpec),
    phase=st.sampled_from(Phase),
    nodes=st.dictionaries(
        st.text(),
        st.builds(
            Node,
            node_id=st.text(),
            key_hash=st.text(),
            slots=st.integers(),
            address=st.text(),
            order=st.integers(),
            state=st.sampled_from(NodeState),
            ready=st.none() | st.from_type(Ready),
        ),
    ),
    generation=st.none() | st.from_type(Generation),
    change=st.none() | st.from_type(Change),
    checkpoint=st.none() | st.builds(Checkpoint, st.integers(), st.integers(), st.floats(allow_nan=False), st.text()),
)


@given(records)
def test_codec_gives_back_every_record(record: Record) -> None:
    # By their text: NaN is not equal to itself.
    assert repr(decode(Record, encode(record))) == repr(record)


def test_codec_fills_fields_that_an_older_release_did_not_write() -> None:
    record = decode(Record, '{"name": "a", "spec": {"min_nodes": 1, "max_nodes": 2}}')
    assert record == Record("a", JobSpec(min_nodes=1, max_nodes=2))


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        "{}",
        '{"name": "a", "spec": {}, "later": 1}',
        '{"name": 5, "spec": {}}',
        '{"name": "a", "spec": {}, "phase": "x"}',
        '{"name": "a", "spec": {}, "next_order": true}',
    ],
)
def test_codec_refuses_what_this_release_does_not_write(text: str) -> None:
    with pytest.raises(CodecError, match="not a Record"):
        decode(Record, text)


def points(first: int, last: int) -> tuple[Point, ...]:
    return tuple(Point(float(n), 1, n, n, 1.5, 2.0, math.nan, math.inf, 0.1, 3.0) for n in range(first, last))


async def test_a_curve_is_saved_piece_by_piece_or_anew_and_goes_with_its_job(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.save(Save("a", Record("a", SPEC), points=points(0, 3)))
    await store.save(Save("a", points=points(3, 5)))
    await store.save(Save("b", Record("b", SPEC), points=points(0, 9)))
    await store.save(Save("b", points=points(0, 4), points_anew=True))
    await store.close()
    store = open_store(tmp_path)
    found = {job.record.name: job.points for job in store.load().jobs}
    # By their text: NaN is not equal to itself.
    assert repr(found["a"]) == repr(tuple(Point(*map(float, point)) for point in points(0, 5)))
    assert len(found["b"]) == 4
    await store.save(Save("b", forget=True))
    await store.close()
    store = open_store(tmp_path)
    assert [job.record.name for job in store.load().jobs] == ["a"]
    await store.close()


async def test_the_file_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.save(Save("a", Record("a", SPEC)))
    await store.close()
    database = sqlite3.connect(tmp_path / "controller.sqlite3")
    database.executescript("DROP TABLE points; PRAGMA user_version = 1;")
    database.close()
    store = open_store(tmp_path)
    await store.save(Save("a", points=points(0, 3)))
    assert [job.record.name for job in store.load().jobs] == ["a"]
    await store.close()


async def test_what_was_saved_is_loaded_by_the_next_controller(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = Record("a", SPEC, nodes={"n0": Node("n0", "hash", 2, "::1", 0)})
    await store.save(Save("a", record, Marks(checkpoint_s=5.0), (event(1), event(2)), (summary(1),)))
    await store.close()
    store = open_store(tmp_path)
    (job,) = store.load().jobs
    assert job.record == record
    assert job.marks == Marks(checkpoint_s=5.0)
    assert job.events == (event(1), event(2))
    assert job.generations == (summary(1),)
    await store.close()


async def test_saves_that_share_a_commit_keep_their_order_and_all_their_events(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = Record("a", SPEC)
    saves = [
        store.save(Save("a", replace(record, next_order=n), events=(event(n),), generations=(summary(1),)))
        for n in range(1, 51)
    ]
    saves.append(store.save(Save("b", Record("b", SPEC), events=(event(51),))))
    await asyncio.gather(*saves)
    a, b = store.load().jobs
    assert a.record.next_order == 50
    assert [e.sequence for e in a.events] == list(range(1, 51))
    assert b.record.name == "b"
    await store.close()


async def test_a_forgotten_job_is_gone_and_its_name_free_within_one_commit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await asyncio.gather(
        store.save(Save("a", Record("a", SPEC), events=(event(1),), generations=(summary(1),))),
        store.save(Save("a", forget=True)),
        store.save(Save("a", Record("a", SPEC, reason="again"), events=(event(2),))),
    )
    (job,) = store.load().jobs
    assert job.record.reason == "again"
    assert job.events == (event(2),)
    assert job.generations == ()
    await store.save(Save("a", forget=True))
    assert store.load().jobs == ()
    await store.close()


async def test_sequence_numbers_of_forgotten_events_are_not_given_out_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.save(Save("a", Record("a", SPEC), events=(event(41), event(42))))
    await store.save(Save("a", forget=True))
    await store.close()
    store = open_store(tmp_path)
    assert store.load().last_sequence == 42
    await store.close()


async def test_keeps_only_the_newest_events_and_generations(tmp_path: Path) -> None:
    store = open_store(tmp_path, kept_events=3, kept_generations=2)
    await store.save(Save("other", Record("other", SPEC), events=(event(1),)))
    for n in range(2, 12):
        await store.save(Save("a", Record("a", SPEC), events=(event(n),), generations=(summary(n, n // 6 + 1),)))
    a, other = store.load().jobs
    assert [e.sequence for e in a.events] == [9, 10, 11]
    assert [g.generation.number for g in a.generations] == [10, 11]
    assert len(other.events) == 1
    await store.close()


async def test_a_second_controller_cannot_use_the_directory(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match=r"in use by another controller \(process \d+\)"):
        open_store(tmp_path)
    await store.close()
    await open_store(tmp_path).close()


async def test_refuses_the_schema_of_a_newer_release(tmp_path: Path) -> None:
    await open_store(tmp_path).close()
    database = sqlite3.connect(tmp_path / "controller.sqlite3")
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(StoreError, match=f"schema version {SCHEMA_VERSION + 1}.*newer release"):
        open_store(tmp_path)


def test_refuses_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "controller.sqlite3").write_bytes(b"something else entirely" * 100)
    with pytest.raises(StoreError, match="not a controller's database"):
        open_store(tmp_path)


async def test_after_a_failed_save_nothing_more_is_saved(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.save(Save("a", Record("a", SPEC), events=(event(1),)))
    with pytest.raises(StoreError, match="cannot save"):
        # The sequence number is taken: the whole save must fail, its record too.
        await store.save(Save("a", Record("a", SPEC, reason="half"), events=(event(1),)))
    with pytest.raises(StoreError, match="cannot save"):
        await store.save(Save("a", Record("a", SPEC, reason="later")))
    await store.close()
    store = open_store(tmp_path)
    assert store.load().jobs[0].record.reason == ""
    await store.close()


_WRITER = """
import asyncio, sys
from pathlib import Path
from stretto_controller.core.model import JobSpec, Record
from stretto_controller.store.contents import Save, StoredEvent
from stretto_controller.store.sqlite import SqliteStore

async def write(store, job, sequence):
    record = Record(job, JobSpec(min_nodes=1, max_nodes=4), next_order=sequence)
    await store.save(Save(job, record, events=(StoredEvent(sequence, 0.0, "k", "r"),)))
    print(job, sequence, flush=True)

async def main():
    store = SqliteStore(Path(sys.argv[1]), kept_events=10**6, kept_generations=10)
    sequence = store.load().last_sequence
    while True:
        await asyncio.gather(*(write(store, f"job{i % 3}", sequence + i + 1) for i in range(7)))
        sequence += 7

asyncio.run(main())
"""


async def test_every_acknowledged_save_survives_kill_9(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    acknowledged: set[tuple[str, int]] = set()
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]
        time.sleep(rng.uniform(0.0, 0.15))
        writer.kill()
        lines += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        # The last line may be cut short by the kill.
        acknowledged |= {(job, int(n)) for job, n in (line.split() for line in lines if line.endswith("\n"))}
        store = open_store(tmp_path, kept_events=10**6)
        jobs = store.load().jobs
        await store.close()
        kept = {(job.record.name, e.sequence) for job in jobs for e in job.events}
        assert acknowledged <= kept
        for job in jobs:
            # Record and events of one save are both there, or neither.
            assert job.record.next_order == job.events[-1].sequence
    assert len(acknowledged) > 50
