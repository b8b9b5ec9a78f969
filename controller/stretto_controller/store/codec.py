"""Core values <-> JSON, without loss, driven by the dataclasses' own types."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_Convert = Callable[[Any], Any]


class CodecError(ValueError):
    """The text is not what this release writes."""


def encode(value: object) -> str:
    """The JSON text of a core dataclass."""
    return json.dumps(_of(type(value))[0](value), separators=(",", ":"))


def decode(kind: type[T], text: str) -> T:
    """The value that `encode` was given. Fields that the text lacks take their defaults; unknown ones are refused."""
    try:
        value: T = _of(kind)[1](json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CodecError(f"not a {kind.__name__} of this release: {error}") from error
    return value


def _of(kind: Any) -> tuple[_Convert, _Convert]:
    """For mypy alone, to which a class is not known to be hashable."""
    return _converters(kind)


@cache
def _converters(kind: Any) -> tuple[_Convert, _Convert]:
    """(to plain JSON values, back) for one type."""
    origin = get_origin(kind)
    if kind in (int, float, str, bool):
        return _same, _scalar(kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return str, kind
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind)
    if origin in (Union, types.UnionType):
        return _optional(kind)
    if origin is tuple:
        return _sequence(get_args(kind)[0])
    if origin is Mapping:
        return _mapping(get_args(kind)[1])
    raise AssertionError(f"the codec has no rule for {kind}")


def _same(value: Any) -> Any:
    return value


def _scalar(kind: type) -> _Convert:
    allowed = (int, float) if kind is float else (kind,)

    def check(value: Any) -> Any:
        if type(value) not in allowed:
            raise TypeError(f"{value!r} is not of type {kind.__name__}")
        return kind(value)

    return check


def _dataclass(kind: type) -> tuple[_Convert, _Convert]:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.init]
    pairs = {name: _converters(hints[name]) for name in names}

    def to_plain(value: Any) -> Any:
        return {name: pairs[name][0](getattr(value, name)) for name in names}

    def from_plain(plain: Any) -> Any:
        unknown = plain.keys() - pairs.keys()
        if unknown:
            raise ValueError(f"{kind.__name__} has unknown fields {', '.join(sorted(unknown))}")
        return kind(**{name: pairs[name][1](item) for name, item in plain.items()})

    return to_plain, from_plain


def _optional(kind: Any) -> tuple[_Convert, _Convert]:
    inner = [part for part in get_args(kind) if part is not types.NoneType]
    assert len(inner) == 1, f"the codec has no rule for {kind}"
    to_inner, from_inner = _converters(inner[0])
    return (
        lambda value: None if value is None else to_inner(value),
        lambda plain: None if plain is None else from_inner(plain),
    )


def _sequence(item: Any) -> tuple[_Convert, _Convert]:
    to_item, from_item = _converters(item)
    return (
        lambda values: [to_item(value) for value in values],
        lambda plain: tuple(from_item(value) for value in plain),
    )


def _mapping(item: Any) -> tuple[_Convert, _Convert]:
    to_item, from_item = _converters(item)
    return (
        lambda values: {key: to_item(value) for key, value in values.items()},
        lambda plain: {key: from_item(value) for key, value in plain.items()},
    )
