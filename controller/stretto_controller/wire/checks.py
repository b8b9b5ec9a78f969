"""Checks of single fields: each returns the value, or raises Rejected with what was given and what is allowed."""

from __future__ import annotations

import math
import re

from stretto_controller.core.errors import Rejected

LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_JOB = re.compile(LABEL)
_NODE = re.compile(rf"{LABEL}(?:\.{LABEL})*")
_ADDRESS = re.compile(r"[A-Za-z0-9._:%-]+")
_NAME_LENGTH = 253
_SHOWN = 80
# What a double can hold exactly; no count of ours comes near.
_LARGEST = 2**53


def job_name(value: str) -> str:
    """A DNS label: it becomes part of host names, Kubernetes objects and metric labels."""
    if len(value) > 63 or not _JOB.fullmatch(value):
        raise Rejected.invalid(
            f"job is {shown(value)}; a job's name is a DNS label: 1 to 63 of a-z, 0-9 and '-', "
            "beginning and ending with a letter or digit"
        )
    return value


def node_id(value: str) -> str:
    if len(value) > _NAME_LENGTH or not _NODE.fullmatch(value):
        raise Rejected.invalid(
            f"node_id is {shown(value)}; it is a DNS name of at most {_NAME_LENGTH} characters: labels of a-z, "
            "0-9 and '-', with dots between"
        )
    return value


def address(value: str) -> str:
    """A host name or an IP address, without a port."""
    if len(value) > _NAME_LENGTH or not _ADDRESS.fullmatch(value):
        raise Rejected.invalid(
            f"address is {shown(value)}; give a host name or an IP address, at most {_NAME_LENGTH} characters"
        )
    return value


def text(field: str, value: str, limit: int) -> str:
    """Free text for people, at most `limit` characters."""
    if len(value) > limit:
        raise Rejected.invalid(f"{field} has {len(value)} characters; at most {limit} are allowed")
    return value


def secret(field: str, value: str, least: int, limit: int) -> str:
    """Never shown, not even in the error."""
    if not least <= len(value) <= limit:
        raise Rejected.invalid(f"{field} has {len(value)} characters; it must have {least} to {limit}")
    return value


def count(field: str, value: int, least: int = 0) -> int:
    if not least <= value < _LARGEST:
        raise Rejected.invalid(f"{field} is {value}; it must be a whole number of at least {least}")
    return value


def port(field: str, value: int) -> int:
    if not 0 <= value <= 65535:
        raise Rejected.invalid(f"{field} is {value}; it must be between 0 (none) and 65535")
    return value


def amount(field: str, value: float) -> float:
    """A finite number of at least 0."""
    if not 0 <= value < math.inf:
        raise Rejected.invalid(f"{field} is {value}; it must be a finite number of at least 0")
    return value


def shown(value: str) -> str:
    """The value as an error may repeat it: quoted, escaped, short."""
    return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}... ({len(value)} characters)"
