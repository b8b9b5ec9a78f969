"""`dataclasses.replace` for values that change with every heartbeat, at a third of its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def changed(value: T, **changes: object) -> T:
    """The same dataclass value with these fields in place of its own. Not for fields that __init__ does not take."""
    # For mypy alone, to which a class is not known to be hashable.
    kind: Any = type(value)
    take, places = _layout(kind)
    values = list(take(value))
    for name, item in changes.items():
        values[places[name]] = item
    new: T = kind(*values)
    return new


@cache
def _layout(kind: Any) -> tuple[Callable[[Any], tuple[object, ...]], dict[str, int]]:
    names = [field.name for field in fields(kind)]
    return attrgetter(*names), {name: index for index, name in enumerate(names)}
