"""A power cut keeps what was synced, and any part of the rest: the newest committed checkpoint survives."""

from __future__ import annotations

import os
import random
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from stretto.checkpoint import Checkpointer, CheckpointSettings

KEEP = 2


@dataclass(frozen=True)
class Change:
    """One change to a directory: a name appears or disappears. target: what it then names (an inode), None: nothing."""

    directory: str
    name: str
    target: int | None


@dataclass
class Disk:
    """What a disk has been told: contents by inode, and changes to directories, some of them synced."""

    contents: dict[int, bytes] = field(default_factory=dict)
    synced_contents: dict[int, bytes] = field(default_factory=dict)
    changes: list[tuple[Change, bool]] = field(default_factory=list)  # synced?

    def sync_directory(self, directory: str) -> None:
        self.changes = [(c, synced or c.directory == directory) for c, synced in self.changes]

    def after_a_cut(self, root: Path, rng: random.Random) -> None:
        """Build what may be left: all that is synced, any of the rest, files cut or filled with rubbish."""
        entries: dict[tuple[str, str], int | None] = {}
        for change, synced in self.changes:
            if synced or rng.random() < 0.5:
                entries[change.directory, change.name] = change.target
        root.mkdir()
        for (directory, name), inode in sorted(entries.items()):
            if inode is None or not _exists(directory, entries):
                continue
            place = root / directory / name
            if inode < 0:
                place.mkdir(exist_ok=True)
                continue
            data = self.contents.get(inode, b"")
            if self.synced_contents.get(inode) != data and rng.random() < 0.8:
                data = data[: rng.randrange(len(data) + 1)]
                if data and rng.random() < 0.3:
                    data = bytes(len(data))
            place.write_bytes(data)


def _exists(directory: str, entries: dict[tuple[str, str], int | None]) -> bool:
    return directory == "" or entries.get(("", directory)) is not None


class Recorder:
    """Stands between the store and the operating system, which does everything as well."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.disk = Disk()
        self.history: list[Disk] = []
        self._one_at_a_time = threading.RLock()  # files are written by several threads
        for name in ("fsync", "replace", "unlink", "mkdir", "makedirs", "remove", "rmdir"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._one_at_a_time:
                before = self._look()
                result = real(*arguments, **options)
                self._note(before, self._look())
                if name == "fsync":
                    self._synced(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                self._keep()
                return result

        return call

    def _look(self) -> dict[tuple[str, str], int]:
        found = {}
        for path in self.root.rglob("*"):
            directory = "" if path.parent == self.root else path.parent.name
            inode = path.stat().st_ino
            found[directory, path.name] = -inode if path.is_dir() else inode
            if path.is_file():
                self.disk.contents[inode] = path.read_bytes()
        return found

    def _note(self, before: dict[tuple[str, str], int], after: dict[tuple[str, str], int]) -> None:
        known = {(c.directory, c.name): c.target for c, _ in self.disk.changes}
        for key in sorted({*before, *after, *known}):
            if known.get(key) != after.get(key):
                self.disk.changes.append((Change(*key, after.get(key)), False))

    def _synced(self, path: str) -> None:
        place = Path(path)
        if place == self.root:
            self.disk.sync_directory("")
        elif place.is_dir() and place.parent == self.root:
            self.disk.sync_directory(place.name)
        elif place.is_file():
            inode = place.stat().st_ino
            self.disk.synced_contents[inode] = place.read_bytes()

    def _keep(self) -> None:
        disk = self.disk
        copied = Disk(dict(disk.contents), dict(disk.synced_contents), list(disk.changes))
        self.history.append(copied)


def _state(step: int) -> dict[str, Any]:
    return {"x": torch.full((50,), float(step)), "step": step}


def test_the_newest_committed_checkpoint_survives_a_power_cut_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    committed: list[tuple[int, int]] = []  # after so many operations, this step
    with monkeypatch.context() as patch:
        recorder = Recorder(folder, patch)
        checkpointer = Checkpointer(folder, keep=KEEP, job="digits", settings=CheckpointSettings(part_bytes=150))
        checkpointer.fence(1)
        for step in range(1, 5):
            checkpointer.save(_state(step), step=step, generation=1)
            committed.append((len(recorder.history), step))
    assert len(recorder.history) > 30
    for number, disk in enumerate(recorder.history):
        left = tmp_path / "left"
        disk.after_a_cut(left, rng)
        state: dict[str, Any] = {"x": None, "step": None}
        info = Checkpointer(left, job="digits").load_latest(state)
        expected = max((step for operations, step in committed if operations <= number + 1), default=0)
        assert (info.step if info else 0) >= expected, f"after {number + 1} operations"
        if info is not None:
            assert (state["step"], float(state["x"][-1])) == (info.step, info.step)
        after = Checkpointer(left, job="digits")
        after.save(_state(9), step=9, generation=2)
        again = after.load_latest(state)
        assert again is not None
        assert again.step == 9
        shutil.rmtree(left)
