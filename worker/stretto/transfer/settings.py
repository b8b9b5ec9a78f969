"""Sizes and limits of a transfer."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 4096, 1024 * _MIB


@dataclass(frozen=True)
class TransferSettings:
    """`chunk_bytes` of the source holds for all ranks; the limits are each rank's own."""

    chunk_bytes: int = 32 * _MIB  # of one message at most. Each is one collective, with its own timeout
    in_flight: int = 4  # messages that travel at a time. Small tensors, and those of an accelerator, need a buffer each
    max_manifest_bytes: int = 64 * _MIB  # of the plain part: a larger one is refused
    max_state_bytes: int = 1 << 40  # of all tensors: a larger state is refused

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from 1")
        check_chunk_bytes(self.chunk_bytes)


def check_chunk_bytes(value: int) -> None:
    """Raise ValueError for a size that no rank accepts."""
    # Parts of tensors begin at multiples of it: 8 keeps them aligned for the checksum.
    if not MIN_CHUNK_BYTES <= value <= MAX_CHUNK_BYTES or value % 8:
        raise ValueError(f"chunk_bytes is {value}; allowed: multiples of 8 from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")
