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
    """Those that go: beyond the `keep` newest whole ones, and not the first at a multiple of `keep_every_tau`.

    The newest verified one never goes, and what is damaged goes only when it is older than those that are kept. Where
    nothing is verified, nothing goes.
    """
    newest_first = sorted(found, key=lambda each: each.name, reverse=True)
    safe = next((each.name for each in newest_first if each.verified), None)
    if safe is None:
        return []
    milestones = _milestones(found, keep_every_tau) if keep_every_tau else set()
    doomed, whole = [], 0
    for each in newest_first:
        if whole >= keep and each.name != safe and each.name not in milestones:
            doomed.append(each.name)
        whole += each.whole
    return doomed


def _milestones(found: Sequence[Found], every: float) -> set[CheckpointName]:
    """The first whole one at or after each multiple of `every`; what is before the first multiple is none."""
    first: dict[int, Found] = {}
    for each in found:
        number = math.floor(each.tau / every)
        if each.whole and number and (number not in first or each.tau < first[number].tau):
            first[number] = each
    return {each.name for each in first.values()}
