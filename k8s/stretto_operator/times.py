"""Kubernetes' times and durations <-> seconds. Pure: what time it is comes from outside."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def from_text(text: str | None) -> float | None:
    """Seconds since the Unix epoch of `2026-11-21T18:00:00Z`; None for nothing."""
    return datetime.fromisoformat(text).timestamp() if text else None


def to_text(time_s: float) -> str:
    """To the second, as the API writes times."""
    return datetime.fromtimestamp(int(time_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_micro_text(time_s: float) -> str:
    """To the microsecond, as Leases have it."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def duration_s(text: str) -> float:
    """Seconds of `90s`, `5m` or `1h30m`. Raises ValueError for anything else."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration; write it as 90s, 5m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
