"""Which checkpoints to delete: pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stretto.checkpoint.name import CheckpointName


@dataclass(frozen=True)
class Found:
    """A committed checkpoint. `whole`: all its files are there. `verified`: and every byte was seen to be right."""

    name: CheckpointName
    tau: float
    whole: bool
    verified: bool


def superfluous(found: Sequence[Found], *, keep: int, keep_every_tau: float | None) -> list[CheckpointName]:
    """Those that go: older than the `keep` newest verified ones, and not the first at a multiple of `keep_every_tau`.

    What is not known to be right counts for nothing: until enough is, nothing goes, and the newest verified one never.
    """
    milestones = _milestones(found, keep_every_tau) if keep_every_tau else set()
    doomed, verified = [], 0
    for each in sorted(found, key=lambda each: each.name, reverse=True):
        if verified >= keep and each.name not in milestones:
            doomed.append(each.name)
        verified += each.verified
    return doomed


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
