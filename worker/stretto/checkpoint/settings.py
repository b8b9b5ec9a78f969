"""Limits of saving and loading."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class CheckpointSettings:
    # A file's size; several are written, read and checked at once.
    part_bytes: int = 64 << 20
    # That copy the state, while training waits.
    copy_threads: int = 2
    # In the background, beside training. More are faster, and take more of its cores.
    write_threads: int = 1
    # Of one core's time, that each of these takes until somebody waits for the save.
    write_share: float = 0.15
    # ... and while training waits.
    urgent_threads: int = 2
    # That read and check files. A disk wants several reads at once.
    read_threads: int = 4
    # Before the newest checkpoint whose bytes were read may go, each rank reads what it has written of a newer one: of
    # one in `keep` saves. False: what was written is taken to be there.
    read_back: bool = True
    # A rank whose share is not there by then has failed the save.
    shares_limit_s: float = 120.0
    # Workers that leave as planned wait so long for a save that is running, to tell of it.
    leave_wait_s: float = 5.0
    # So many saves in a row may fail with a warning; the next failure ends the training.
    failures_allowed: int = 3

    def validate(self) -> None:
        """Raise ValueError for a value that makes no sense."""
        for name in (field.name for field in fields(self) if field.type != "bool"):
            least = 0 if name == "failures_allowed" else None
            value = getattr(self, name)
            if value < 0 if least == 0 else value <= 0:
                raise ValueError(f"{name} is {value}; it must be {'at least' if least == 0 else 'above'} 0")
        if self.write_share > 1:
            raise ValueError(f"write_share is {self.write_share}; it must be at most 1, which is one core's time")
