"""Which checkpoints to delete: pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stretto.checkpoint.name import CheckpointName


@dataclass(frozen=True)
class Found:
    """A committed checkpoint. `whole`: all its files are there. `verified`: and this process wrote or read every byte.

    `read`: it read them, from where they are stored.
    """

    name: CheckpointName
    tau: float
    whole: bool
    verified: bool
    read: bool


def superfluous(found: Sequence[Found], *, keep: int, keep_every_tau: float | None) -> list[CheckpointName]:
    """Those that go: older than the `keep` newest verified ones, and not the first at a multiple of `keep_every_tau`.

    What is not known to be right counts for nothing: until enough is, nothing goes; and nothing that is not older than
    the newest one whose bytes were read.
    """
    milestones = _milestones(found, keep_every_tau) if keep_every_tau else set()
    doomed, verified, read = [], 0, False
    for each in sorted(found, key=lambda each: each.name, reverse=True):
        if verified >= keep and read and each.name not in milestones:
            doomed.append(each.name)
        verified += each.verified
        read = read or each.read
    return doomed


def must_be_read(name: CheckpointName, found: Sequence[Found], *, keep: int, keep_every_tau: float | None) -> bool:
    """Whether older ones can go only if a checkpoint that is about to be written is read again."""
    taken_on_trust, seen = (
        superfluous(
            [*found, Found(name, 0.0, whole=True, verified=True, read=read)], keep=keep, keep_every_tau=keep_every_tau
        )
        for read in (False, True)
    )
    return taken_on_trust != seen


def to_verify(found: Sequence[Found], *, keep: int) -> CheckpointName | None:
    """The one whose bytes are to be read before anything can go; None where nothing has to, or enough is verified."""
    whole = sorted((each for each in found if each.whole), key=lambda each: each.name, reverse=True)
    if len(whole) <= keep or sum(each.verified for each in whole) >= keep:
        return None
    return next(each.name for each in whole if not each.verified)


def _milestones(found: Sequence[Found], every: float) -> set[CheckpointName]:
    """The first whole one at or after each multiple of `every`; what is before the first multiple is none."""
    first: dict[int, Found] = {}
    for each in found:
        number = math.floor(each.tau / every)
        if each.whole and number and (number not in first or each.tau < first[number].tau):
            first[number] = each
    return {each.name for each in first.values()}
