"""One gRPC stream on one connection, as cheap as can be: the generator must not be what is measured.

Only what a bidirectional stream to a gRPC server needs of HTTP/2 (RFC 9113), and a fixed request in HPACK (RFC 7541).
Our windows are so large that the server never waits for them; what we send stays far below the server's.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
# Of a frame, until the server says otherwise.
_LONGEST = 1 << 14
_HEAD = struct.Struct(">HBBBL")
_PREFIX = struct.Struct(">BL")
# HEADER_TABLE_SIZE 0: nothing is remembered, so trailers can be read as they stand. INITIAL_WINDOW_SIZE: the largest.
_OUR_SETTINGS = struct.pack(">HLHL", 1, 0, 4, 2**31 - 1)
_STATUS = re.compile(rb"grpc-status.(\d{1,2})", re.DOTALL)
_MESSAGE = re.compile(rb"grpc-message.([ -~]*)", re.DOTALL)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 255, kind, flags, stream) + payload


def _literal(text: str) -> bytes:
    data = text.encode()
    assert len(data) < 127, f"{text!r} is too long for one octet of length"
    return bytes([len(data)]) + data


def opening(method: str, authority: str, authorization: str = "") -> bytes:
    """All that comes before the first message."""
    # :method POST, :scheme http, :path, :authority, content-type, te; the numbers are HPACK's static table.
    request = b"\x83\x86\x04" + _literal(method) + b"\x01" + _literal(authority)
    request += b"\x0f\x10" + _literal("application/grpc") + b"\x00" + _literal("te") + _literal("trailers")
    if authorization:
        request += b"\x0f\x08" + _literal(authorization)
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, _OUR_SETTINGS)
        + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">L", 2**30))
        + _frame(_HEADERS, _END_HEADERS, 1, request)
    )


def framed(message: bytes) -> bytes:
    """One message of the stream, ready to be written."""
    data = _PREFIX.pack(0, len(message)) + message
    return b"".join(_frame(_DATA, 0, 1, data[at : at + _LONGEST]) for at in range(0, len(data), _LONGEST))


def closing() -> bytes:
    """No more messages follow."""
    return _frame(_DATA, _END_STREAM, 1, b"")


class Connection(asyncio.Protocol):
    """Calls `on_message` with each answer's bytes and, once, `on_end` with the status (-1: none came) and why."""

    def __init__(self, first: bytes, on_message: Callable[[bytes], None], on_end: Callable[[int, str], None]) -> None:
        self._first = first
        self._on_message = on_message
        self._on_end: Callable[[int, str], None] | None = on_end
        self._received = bytearray()
        self._body = bytearray()
        self._transport: asyncio.Transport | None = None

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """Close without a word, as the kernel does for a process that was killed; `on_end` is not called."""
        self._on_end = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._first)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end(-1, str(error or "the connection was closed"))

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        while len(received) - at >= 9:
            high, low, kind, flags, _stream = _HEAD.unpack_from(received, at)
            end = at + 9 + (high << 8) + low
            if len(received) < end:
                break
            self._take(kind, flags, bytes(received[at + 9 : end]))
            at = end
        del received[:at]

    def _take(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _DATA:
            self._body += payload
            self._read_messages()
        elif kind == _SETTINGS and not flags & _ACK:
            self.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _HEADERS and flags & _END_STREAM:
            status, message = _STATUS.search(payload), _MESSAGE.search(payload)
            self._end(int(status[1]) if status else -1, message[1].decode() if message else "")
        elif kind in (_RST_STREAM, _GOAWAY):
            self._end(-1, "the stream was reset")

    def _read_messages(self) -> None:
        body = self._body
        while len(body) >= 5:
            _, size = _PREFIX.unpack_from(body)
            if len(body) < 5 + size:
                return
            message = bytes(body[5 : 5 + size])
            del body[: 5 + size]
            self._on_message(message)

    def _end(self, status: int, message: str) -> None:
        on_end, self._on_end = self._on_end, None
        if self._transport is not None:
            self._transport.abort()
        if on_end is not None:
            on_end(status, message)
