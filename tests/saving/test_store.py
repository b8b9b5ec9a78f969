"""One folder of files: every byte arrives, whether or not it goes past the page cache."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest
from stretto.checkpoint.store import Store

PAGE = 4096


def _bytes(size: int) -> memoryview:
    """Random ones, in memory that begins with a page."""
    area = mmap.mmap(-1, max(size, 1))
    area[:size] = random.Random(size).randbytes(size)
    return memoryview(area)[:size]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [PAGE],
        [PAGE - 1, PAGE],  # the second begins where no page does
        [3 * PAGE, 8],
        [3 * PAGE + 5],
        [64 * PAGE, 64 * PAGE, 64 * PAGE + 1, PAGE],
    ],
)
def test_every_byte_arrives_at_any_size(sizes: list[int], direct: bool, tmp_path: Path) -> None:
    chunks = [_bytes(size) for size in sizes]
    Store(tmp_path).write("file", chunks, direct=direct)
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)
    assert os.listdir(tmp_path) == ["file"]


def test_memory_that_begins_anywhere_is_written_as_well(tmp_path: Path) -> None:
    chunk = _bytes(64 * PAGE)[3:]
    Store(tmp_path).write("file", [chunk], direct=True)
    assert (tmp_path / "file").read_bytes() == chunk


def test_file_systems_without_direct_writes_take_them_all_the_same() -> None:
    """/dev/shm is in memory; what it cannot do is done the usual way."""
    folder = Path(f"/dev/shm/stretto-test-{os.getpid()}")
    folder.mkdir()
    try:
        chunks = [_bytes(16 * PAGE), _bytes(7)]
        Store(folder).write("file", chunks, direct=True)
        assert (folder / "file").read_bytes() == b"".join(chunks)
    finally:
        (folder / "file").unlink(missing_ok=True)
        folder.rmdir()


def test_large_files_are_read_whole_from_anywhere_whether_cached_or_not(tmp_path: Path) -> None:
    store, data = Store(tmp_path), _bytes(3 * (1 << 20) + 5)
    store.write("file", [data], direct=True)
    for _ in range(2):  # nobody has read it yet; then the page cache has it
        assert store.read("file") == data
        with store.open("file") as file:
            for place in (0, 7, 2 * (1 << 20) - 1, len(data) - 3, PAGE):
                file.seek(place)
                buffer = memoryview(bytearray(100_000))
                count = file.readinto(buffer)  # type: ignore[attr-defined]  # every binary file has it
                assert count
                assert buffer[:count] == data[place : place + count]
            file.seek(len(data))
            assert not file.read(1)
        (tmp_path / "file").read_bytes()


def test_new_folders_are_synced_into_those_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut would take a whole new tree along, were only its last folder's entry on disk."""
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    Store(tmp_path / "a" / "b" / "c").make("")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"} <= set(synced)
