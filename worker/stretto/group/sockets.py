"""This process's TCP sockets: found by their ends, cut by inode and ends, those of others never touched.

Torch closes and opens descriptors in threads of its own, so a number means nothing a moment later. A socket is named
by its inode; to cut one, its descriptor is duplicated, which pins it, checked again, and only then shut down.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Endpoint = tuple[str, int]  # a numeric address (IPv4 where it is a mapped one) and a port

_libc = ctypes.CDLL(None, use_errno=True)
_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
_SYN_SENT, _LISTEN = 2, 10  # states of a TCP socket, as the kernel numbers them


@dataclass(frozen=True)
class TcpSocket:
    """One TCP socket of this process that does not listen."""

    inode: int
    local: Endpoint
    peer: Endpoint


def endpoint(address: str, port: int) -> Endpoint:
    """The one spelling of an end: `::ffff:1.2.3.4` is 1.2.3.4, and a scope is left out."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed), port


def parse_address(raw: bytes) -> Endpoint:
    """Read a socket address as the kernel lays it out; ValueError for one that is not of IP."""
    (family,), (port,) = struct.unpack_from("=H", raw), struct.unpack_from("!H", raw, 2)
    if family == socket.AF_INET:
        return endpoint(socket.inet_ntop(family, raw[4:8]), port)
    if family == socket.AF_INET6:
        return endpoint(socket.inet_ntop(family, raw[8:24]), port)
    raise ValueError(f"a socket address of family {family}, where IPv4 or IPv6 was expected")


def find(wanted: Callable[[TcpSocket], bool]) -> list[TcpSocket]:
    """Return our sockets that are `wanted`, those still connecting included. They are looked at, not touched."""
    found = []
    for descriptor, inode in _descriptors():
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, reset, or not TCP
            each = _look_at(descriptor, inode)
            if each is not None and wanted(each):
                found.append(each)
    return found


def cut(targets: Iterable[TcpSocket]) -> int:
    """Shut these sockets down in both directions, as far as they still exist; return how many there were.

    Never blocks. Whoever reads or writes one of them gets the end of the stream or an error at once; closing stays
    with the owner.
    """
    by_inode = {target.inode: target for target in targets}
    count = 0
    for descriptor, inode in _descriptors() if by_inode else ():
        target = by_inode.get(inode)
        if target is not None:
            count += _cut_one(descriptor, target)
    return count


def _cut_one(descriptor: int, target: TcpSocket) -> bool:
    try:
        pinned = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return False  # closed by its owner meanwhile
    with pinned:
        if os.fstat(pinned.fileno()).st_ino != target.inode or not _has_ends_of(pinned, target):
            return False
        with contextlib.suppress(OSError):  # ENOTCONN: it was reset already
            pinned.shutdown(socket.SHUT_RDWR)
        return True


def _has_ends_of(pinned: socket.socket, target: TcpSocket) -> bool:
    """Inodes are used again: the ends must agree too. A socket without a peer is connecting, or reset."""
    if pinned.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    if endpoint(*pinned.getsockname()[:2]) != target.local:
        return False
    try:
        return endpoint(*pinned.getpeername()[:2]) == target.peer
    except OSError:
        return True


def _descriptors() -> Iterator[tuple[int, int]]:
    """Each socket's descriptor and inode."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile; the listing's own descriptor always is
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


def _look_at(descriptor: int, inode: int) -> TcpSocket | None:
    """Read both ends through libc: a Python socket object would own the descriptor."""
    state = _read(_libc.getsockopt, descriptor, socket.IPPROTO_TCP, socket.TCP_INFO)[0]
    if state == _LISTEN:
        return None
    local = parse_address(_read(_libc.getsockname, descriptor))
    if state == _SYN_SENT:
        peer = _peer_in_table(inode)  # getpeername does not say whom it is connecting to
        return None if peer is None else TcpSocket(inode, local, peer)
    return TcpSocket(inode, local, parse_address(_read(_libc.getpeername, descriptor)))


def _read(function: Any, *arguments: int) -> bytes:
    buffer, length = ctypes.create_string_buffer(128), ctypes.c_uint(128)
    if function(*arguments, buffer, ctypes.byref(length)) != 0:
        raise OSError(ctypes.get_errno(), "the socket cannot be read")
    return buffer.raw


def _peer_in_table(inode: int) -> Endpoint | None:
    """Search the kernel's table of all TCP sockets, which takes it some 20 ms."""
    for path in _TABLES:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as table:  # no IPv6: no such file
            for line in table.readlines()[1:]:
                fields = line.split()
                if int(fields[9]) == inode:
                    return _parse_end(fields[2])
    return None


def _parse_end(text: str) -> Endpoint:
    """An end as the kernel prints it: 32-bit words in the machine's order, in hexadecimal, and the port."""
    address, _, port = text.partition(":")
    words = bytes.fromhex(address)
    starts = range(0, len(words), 4)
    packed = b"".join(int.from_bytes(words[at : at + 4], "big").to_bytes(4, sys.byteorder) for at in starts)
    return endpoint(str(ipaddress.ip_address(packed)), int(port, 16))
