"""Which checkpoints a place holds, and whether they are whole."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from xxhash import xxh3_64

from stretto.checkpoint.errors import Damaged, reason_of
from stretto.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from stretto.checkpoint.name import CheckpointName
from stretto.checkpoint.store import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verification:
    """Whether a checkpoint is whole; true in an `if`. `reason` says what is wrong."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Catalogue:
    """Reads what is in the store, and changes nothing."""

    def __init__(self, store: Store, *, threads: int = 2) -> None:
        self._store = store
        self._threads = threads

    def newest_first(self) -> list[CheckpointName]:
        """Every folder with the name of a checkpoint, whether committed or not."""
        names = (CheckpointName.parse(name) for name in self._store.names())
        return sorted((name for name in names if name), reverse=True)

    def committed(self, name: CheckpointName) -> bool:
        """There is a manifest, or nobody can tell."""
        try:
            return MANIFEST in self._store.names(str(name))
        except OSError:
            return True

    def manifest(self, name: CheckpointName) -> Manifest:
        """The manifest, the files' sizes compared with it. Raises Damaged."""
        try:
            sizes = self._store.names(str(name))
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {reason_of(error, self._store.url)}") from error
        if MANIFEST not in sizes:
            raise Damaged(f"{MANIFEST} is missing: the save did not end")
        try:
            manifest = Manifest.decode(self._store.read(f"{name}/{MANIFEST}"), name)
        except OSError as error:
            raise Damaged(f"{MANIFEST} cannot be read: {reason_of(error, self._store.url)}") from error
        for file, entry in manifest.files.items():
            if file not in sizes:
                raise Damaged(f"{file} is missing")
            if sizes[file] != entry.size_bytes:
                raise Damaged(f"{file} has {sizes[file]} bytes instead of {entry.size_bytes}")
        return manifest

    def verify(self, name: CheckpointName) -> Verification:
        """Read every byte of a checkpoint and compare it with the manifest."""
        try:
            manifest = self.manifest(name)
            self.check_files(name, manifest.files)
        except Damaged as damage:
            return Verification(False, str(damage))
        return Verification(True)

    def check_files(self, name: CheckpointName, files: dict[str, FileEntry]) -> None:
        """Raise Damaged unless each file has the bytes that were written."""
        with ThreadPoolExecutor(self._threads, "stretto-verify") as pool:
            for _ in pool.map(partial(self._check_file, name), files.items()):
                pass

    def _check_file(self, name: CheckpointName, item: tuple[str, FileEntry]) -> None:
        file, entry = item
        digest, size_bytes = xxh3_64(), 0
        try:
            for block in self._store.blocks(f"{name}/{file}"):
                digest.update(block)
                size_bytes += len(block)
        except FileNotFoundError as error:
            raise Damaged(f"{file} is missing") from error
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {reason_of(error, self._store.url)}") from error
        check(file, entry, FileEntry(size_bytes, digest.hexdigest()))


def check(file: str, written: FileEntry, found: FileEntry) -> None:
    """Raise Damaged unless a file is what was written."""
    if found.size_bytes != written.size_bytes:
        raise Damaged(f"{file} has {found.size_bytes} bytes instead of {written.size_bytes}")
    if found.xxh3 != written.xxh3:
        raise Damaged(f"{file} does not match its checksum")
