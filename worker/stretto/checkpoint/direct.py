"""Local files past the page cache: the kernel's cost for each new page there is many times that of the transfer.

Training keeps what it has in the cache, and a check reads what the disk has.
"""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
from typing import BinaryIO

_ALIGNED = 4096  # memory, place in the file, and length
_SCRATCH_BYTES = 2 << 20
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # memory or place do not suit, or the file system cannot do it


def append(descriptor: int, view: memoryview, direct: bool) -> None:
    """Write all of it at the end; direct: as far as alignment and the file system allow."""
    direct = direct and _set_direct(descriptor, True)
    while view:  # a nearly full disk takes a part of it first
        whole = len(view) // _ALIGNED * _ALIGNED
        direct = direct and bool(whole or _set_direct(descriptor, False))
        try:
            count = os.write(descriptor, view[:whole] if direct else view)
        except OSError as error:
            if not direct or error.errno not in _REFUSALS:
                raise
            direct = _set_direct(descriptor, False)
            continue
        view = view[count:]
    if direct:
        _set_direct(descriptor, False)  # the next may be shorter


def is_cached(descriptor: int) -> bool:
    """Whether the file seems to be in the page cache; yes where that cannot be found out."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    for place in (0, max(os.fstat(descriptor).st_size - 1, 0)):
        try:
            os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


class DirectFile(io.RawIOBase, BinaryIO):
    """Reads a file that somebody else opened, and closes; through the page cache where it cannot be otherwise."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._direct = _set_direct(self._descriptor, True)
        self._scratch = memoryview(mmap.mmap(-1, _SCRATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._begin = self._end = 0  # of what of the file is in it
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET, "nobody seeks otherwise"
        self._position = offset
        return offset

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]  # RawIOBase takes more
        if not self._begin <= self._position < self._end:
            self._begin = self._position // _ALIGNED * _ALIGNED
            self._end = self._begin + self._read()
        found = self._scratch[self._position - self._begin : self._end - self._begin][: len(target)]
        target[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _read(self) -> int:
        try:
            return os.preadv(self._descriptor, [self._scratch], self._begin)
        except OSError as error:
            if not self._direct or error.errno not in _REFUSALS:
                raise
            self._direct = _set_direct(self._descriptor, False)
            return os.preadv(self._descriptor, [self._scratch], self._begin)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Whether transfers go past the page cache from here on."""
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError:  # a file system that has no such thing
        return False
    return direct
