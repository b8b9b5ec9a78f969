"""Local files past the page cache: the kernel's cost for each new page there is many times that of the transfer.

Training keeps what it has in the cache, and a check reads what the disk has. Loading is done through the cache, whose
reading ahead keeps the disk busier.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

_ALIGNED = 4096  # memory, place in the file, and length
_SCRATCH_BYTES = 4 << 20
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


def blocks(descriptor: int) -> Iterator[memoryview]:
    """What the disk has of a file, from its beginning on; through the page cache where it cannot be otherwise.

    A block counts until the next is asked for.
    """
    scratch = memoryview(mmap.mmap(-1, _SCRATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    direct, place = _set_direct(descriptor, True), 0
    while True:
        try:
            count = os.preadv(descriptor, [scratch], place)
        except OSError as error:
            if not direct or error.errno not in _REFUSALS:
                raise
            direct = _set_direct(descriptor, False)
            continue
        if not count:
            return
        yield scratch[:count]
        place += count
        if direct and count % _ALIGNED:  # the file's end, or a file system that gives as much as it likes
            direct = _set_direct(descriptor, False)


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
