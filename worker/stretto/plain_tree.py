"""Nested state as JSON plus a table of tensors, without loss and without pickle: what is saved, or sent to peers.

JSON has no int keys, tuples, NaN or tensors. Everything that JSON cannot say is an object with one key that
starts with "$"; dicts whose keys are not all plain strings are written as lists of pairs.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ALLOWED = "None, bool, int, float, str, bytes, torch.Tensor, torch.dtype; list, tuple, set, dict of these"
_METADATA = "_metadata"  # where torch modules keep the versions of their state


class TreeEncoder:
    """Turns nested values into JSON values, and puts their tensors into `tensors`, as files want them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        # Holding a tensor keeps its address from being used by another one.
        self._seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._addresses: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        """Return a JSON value; `where` names the place in errors."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            return _encode_float(float(value))
        if isinstance(value, Tensor):
            return {"$tensor": self._store(value, where)}
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, dict):
            return self._encode_dict(value, where)
        if type(value) in (list, tuple, set, frozenset):
            items = [self.encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
            return items if type(value) is list else {f"${type(value).__name__}": items}
        raise ValueError(
            f"{where} is a {type(value).__name__}, which saved state cannot hold; allowed: {_ALLOWED}; "
            "give the state of other objects as plain values"
        )

    def _encode_dict(self, value: dict[Any, Any], where: str) -> Any:
        plain = type(value) is dict
        if plain and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [
            [self.encode(key, f"a key of {where}"), self.encode(item, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]
        if plain:
            return {"$dict": pairs}
        if type(value) is Counter:
            return {"$counter": pairs}
        if isinstance(value, OrderedDict):
            metadata = getattr(value, _METADATA, None)
            return {"$ordered": [pairs, self.encode(metadata, f"{where}.{_METADATA}")]}
        raise ValueError(
            f"{where} is a {type(value).__name__}, which would come back as another type; allowed: dict, "
            "OrderedDict, Counter"
        )

    def _store(self, tensor: Tensor, where: str) -> str:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(
                f"{where} is a {type(tensor).__name__} with layout {tensor.layout}; "
                "saved state holds dense tensors: give the local or full one"
            )
        if tensor.is_complex() or tensor.is_quantized:
            raise ValueError(f"{where} has dtype {tensor.dtype}; store its parts as real tensors")
        # Tied weights are one tensor under several names: write them once.
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in self._seen:
            return self._seen[identity][0]
        name = self._named(where)
        self.tensors[name] = self._kept(tensor.detach())
        self._seen[identity] = (name, tensor)
        return name

    def _named(self, where: str) -> str:
        """What the tensor at this place is called in the table."""
        return f"t{len(self.tensors)}"

    def _kept(self, tensor: Tensor) -> Tensor:
        host = tensor.to("cpu").contiguous()
        if host.untyped_storage().nbytes() != host.numel() * host.element_size() or host.data_ptr() in self._addresses:
            host = host.clone()  # a part of something larger: safetensors refuses shared memory
        self._addresses.add(host.data_ptr())
        return host


def decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    """Return the nested value that was encoded; raises ValueError on anything else."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    return _decode_tagged(tag, value[tag], tensors)


def _decode_tagged(tag: str, body: Any, tensors: Mapping[str, Any]) -> Any:
    match tag:
        case "$tensor":
            return tensors[body]
        case "$float":
            return float(body)
        case "$size":
            return torch.Size(body)
        case "$dtype":
            return _dtype(body)
        case "$bytes":
            return base64.b64decode(body)
        case "$tuple":
            return tuple(decode(body, tensors))
        case "$set":
            return set(decode(body, tensors))
        case "$frozenset":
            return frozenset(decode(body, tensors))
        case "$dict":
            return dict(decode(body, tensors))
        case "$counter":
            return Counter(dict(decode(body, tensors)))
        case "$ordered":
            pairs, metadata = body
            ordered: OrderedDict[Any, Any] = OrderedDict(decode(pairs, tensors))
            if metadata is not None:
                setattr(ordered, _METADATA, decode(metadata, tensors))
            return ordered
    raise ValueError(f"the saved state holds {tag!r}, which this release does not know: a newer one wrote it")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the saved state holds the dtype {name!r}, which this release of torch does not know")
    return dtype


def _encode_float(value: float) -> Any:
    return value if value - value == 0.0 else {"$float": repr(value)}  # JSON has no NaN and no infinities
