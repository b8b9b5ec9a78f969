"""Stores that are full, slow, or disturbed at a chosen moment."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stretto.checkpoint import Checkpointer
from stretto.checkpoint.store import Store


class Meddling(Store):
    """Something happens just before, or after, a file of this name is written."""

    def __init__(self, url: Path, file: str, effect: Callable[[], object], *, after: bool = False) -> None:
        super().__init__(url)
        self._file, self._effect, self._after = file, effect, after

    def write(self, path: str, chunks: Iterable[Any], *, direct: bool = False) -> None:
        hit = path.endswith(self._file)
        if hit and not self._after:
            self._effect()
        super().write(path, chunks, direct=direct)
        if hit and self._after:
            self._effect()


def with_store(store: Store, **options: Any) -> Checkpointer:
    checkpointer = Checkpointer(store.url, **options)
    checkpointer._store = checkpointer._committer._store = store
    return checkpointer


class Full(Store):
    """A file system without room for tensors."""

    full = True

    def write(self, path: str, chunks: Iterable[Any], *, direct: bool = False) -> None:
        if self.full and path.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, chunks, direct=direct)


class Held(Store):
    """Writes of tensors wait until they are let go."""

    def __init__(self, url: Path) -> None:
        super().__init__(url)
        self.reached, self.go = threading.Event(), threading.Event()

    def write(self, path: str, chunks: Iterable[Any], *, direct: bool = False) -> None:
        if path.endswith(".safetensors"):
            self.reached.set()
            assert self.go.wait(60)
        super().write(path, chunks, direct=direct)
