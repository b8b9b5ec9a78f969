"""One folder on any file system that fsspec knows: files that are whole or absent, and on disk where there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stretto.checkpoint.direct import append, blocks

_PARTIAL = ".partial"
_UPLOAD_BYTES = 8 << 20  # of one part of an upload
_BLOCK_BYTES = 4 << 20  # read at once from what is no local file
# Object stores have no folders; to make one there would be to make a bucket, perhaps of a name with a typing error.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"})

Bytes = bytes | bytearray | memoryview


class Store:
    """Paths are relative to the folder, with "/" between folder and file.

    On local file systems, NFS among them, a file is written under another name, synced and renamed; `sync` then makes
    the folder's entries durable. Object stores show an object when its upload is complete, and keep it.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        try:
            fs, root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise ValueError(f"{self.url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.url} is no place that fsspec knows: {error}; allowed: a path, file:///path, "
                "s3://bucket/folder (with the extra stretto[s3]), or any other fsspec URL"
            ) from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/") or "/"
        self.local = isinstance(fs, LocalFileSystem)
        self._made = False
        self._objects = self.url.partition("://")[0] in _OBJECT_STORES

    def at(self, *parts: str) -> str:
        """The full path of something in the folder, as the file system knows it."""
        return "/".join((self._root.rstrip("/"), *parts))

    def names(self, folder: str = "") -> dict[str, int]:
        """Entries of the folder, fresh, with their sizes in bytes; empty where there is no folder."""
        path = self.at(folder) if folder else self._root
        if self.local:
            try:
                with os.scandir(path) as entries:
                    return dict(_sizes(entries))
            except FileNotFoundError:
                return {}
            except NotADirectoryError:
                if folder:  # a file of that name is no folder
                    return {}
                raise
        self._fs.invalidate_cache()
        try:
            with _said_as_oserror():
                found = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        names = {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: int(entry.get("size") or 0) for entry in found}
        names.pop(path.rsplit("/", 1)[-1], None)  # some stores list the folder itself
        return names

    def make(self, folder: str) -> None:
        """Have the folder exist, durably where that means something."""
        if not self.local:
            if not self._objects:
                self._fs.makedirs(self.at(folder) if folder else self._root, exist_ok=True)
            return
        root = Path(self._root)
        new = [] if self._made else [root, *(place for place in root.parents if not place.exists())]
        self._fs.makedirs(self.at(folder) if folder else self._root, exist_ok=True)
        for place in reversed(new):
            _sync(place.parent)
        self._made = True
        _sync(root)

    def write(self, path: str, chunks: Iterable[Bytes], *, direct: bool = False) -> None:
        """Write a file; it is there, whole, when this returns.

        direct: past the page cache, where the file system lets it.
        """
        if self.local:
            self._write_local(self.at(path), chunks, direct)
            return
        with _said_as_oserror():
            file = self._fs.open(self.at(path), "wb", block_size=_UPLOAD_BYTES)
            try:
                for chunk in chunks:
                    for start in range(0, len(chunk), _UPLOAD_BYTES):  # what comes at once becomes one part
                        file.write(memoryview(chunk)[start : start + _UPLOAD_BYTES])
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()  # closing would publish a part
                raise
            file.close()

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one; whether it was written by this call."""
        try:
            if self.local:
                with open(self.at(path), "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                _sync(Path(self.at(path)).parent)
            else:
                with _said_as_oserror():
                    self._fs.pipe_file(self.at(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    def sync(self, folder: str = "") -> None:
        """Wait until the disk has the folder's entries."""
        if self.local:
            _sync(Path(self.at(folder) if folder else self._root))

    def read(self, path: str) -> bytes:
        """A whole file; FileNotFoundError where there is none."""
        with self.open(path) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """A file to read from."""
        if self.local:
            with open(self.at(path), "rb", buffering=0) as local:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(local.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                yield local
            return
        self._fs.invalidate_cache()
        with _said_as_oserror(), self._fs.open(self.at(path), "rb") as file:
            yield file

    def blocks(self, path: str) -> Iterator[memoryview]:
        """A file's bytes as the disk has them; a block counts until the next is asked for."""
        with self.open(path) as file:
            if self.local:
                yield from blocks(file.fileno())
                return
            buffer = memoryview(bytearray(_BLOCK_BYTES))
            while count := file.readinto(buffer):  # type: ignore[attr-defined]  # every binary file has it
                yield buffer[:count]

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), _said_as_oserror():
            self._fs.rm_file(self.at(path))

    def remove_folder(self, folder: str, *, first: str) -> None:
        """Delete a folder with its files, if it is there; `first` goes before the others."""
        self.remove(f"{folder}/{first}")
        with contextlib.suppress(FileNotFoundError), _said_as_oserror():
            self._fs.rm(self.at(folder), recursive=True)

    def _write_local(self, path: str, chunks: Iterable[Bytes], direct: bool) -> None:
        partial = path + _PARTIAL
        try:
            with open(partial, "wb", buffering=0) as file:
                for chunk in chunks:
                    append(file.fileno(), memoryview(chunk), direct)
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise


@contextlib.contextmanager
def _said_as_oserror() -> Iterator[None]:
    """Clients of object stores have exceptions of their own: for credentials that are missing, say."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("builtins", "stretto"):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _sizes(entries: Iterator[os.DirEntry[str]]) -> Iterator[tuple[str, int]]:
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):
            yield entry.name, entry.stat().st_size


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
