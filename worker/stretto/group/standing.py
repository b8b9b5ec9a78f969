"""What a process tells its peers about itself, and how it is written on a connection."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

_HEAD = struct.Struct("!16sqI")  # whose job, the number, how many bytes of entries follow
_ENTRY = struct.Struct("!II")  # lengths of a key and of its value, which follow
_MAX_ENTRIES_BYTES = 1 << 24  # gloo publishes 8 bytes for each rank; what claims to be longer is not ours


@dataclass(frozen=True)
class Standing:
    """g while the process builds or uses generation g, -g when it has left it; and what it publishes to that one."""

    number: int = 0
    entries: Mapping[str, bytes] = field(default_factory=dict)

    def pack(self, identity: bytes) -> bytes:
        """One message; `identity` is 16 bytes that processes of one job share."""
        body = b""
        for key, value in self.entries.items():
            raw = key.encode()
            body += _ENTRY.pack(len(raw), len(value)) + raw + value
        return _HEAD.pack(identity, self.number, len(body)) + body


def unpack(buffer: bytes, identity: bytes) -> tuple[Standing | None, bytes]:
    """Take the first message off `buffer`: it, or None if it is not complete yet, and what is left.

    Raises ValueError when the sender is not of our job, or speaks another language.
    """
    if len(buffer) < _HEAD.size:
        return None, buffer
    whose, number, length = _HEAD.unpack_from(buffer)
    if whose != identity or length > _MAX_ENTRIES_BYTES:
        raise ValueError("not a standing of this job's workers")
    end = _HEAD.size + length
    if len(buffer) < end:
        return None, buffer
    return Standing(number, _unpack_entries(buffer[_HEAD.size : end])), buffer[end:]


def _unpack_entries(body: bytes) -> dict[str, bytes]:
    entries, at = {}, 0
    while at < len(body):
        key_length, value_length = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        key = body[at : at + key_length].decode()
        at += key_length
        entries[key] = body[at : at + value_length]
        at += value_length
    return entries
