"""The SQLite store: lossless, whole saves, and every acknowledged save survives kill -9."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
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
from stretto_controller.store.contents import GenerationSummary, Save, StoredEvent, StoreError
from stretto_controller.store.database import SCHEMA_VERSION
from stretto_controller.store.sqlite import SqliteStore

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


async def test_the_file_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.save(Save("a", Record("a", SPEC)))
    await store.close()
    database = sqlite3.connect(tmp_path / "controller.sqlite3")
    database.executescript("DROP TABLE points; PRAGMA user_version = 1;")
    database.close()
    store = open_store(tmp_path)
    await store.save(Save("a", points=(Point(1.0, 1, 1, 1, 1.5, 2.0, 0.5, 0.1, 0.1, 3.0),)))
    assert [job.record.name for job in (await store.load()).jobs] == ["a"]
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
    assert (await store.load()).jobs[0].record.reason == ""
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
    sequence = (await store.load()).last_sequence
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
        jobs = (await store.load()).jobs
        await store.close()
        kept = {(job.record.name, e.sequence) for job in jobs for e in job.events}
        assert acknowledged <= kept
        for job in jobs:
            # Record and events of one save are both there, or neither.
            assert job.record.next_order == job.events[-1].sequence
    assert len(acknowledged) > 50
