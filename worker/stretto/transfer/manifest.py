"""The plain part of a state and a table of its tensors, as JSON that a receiver checks before it believes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.plain_tree import TreeEncoder, decode

FORMAT_VERSION = 1

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not dtype.is_complex and not str(dtype).startswith("torch.q")
}
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_ELEMENTS = 1 << 62


class LiveEncoder(TreeEncoder):
    """Keeps tensors as they are, on their device."""

    def _kept(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            raise ValueError("the state holds a tensor on the meta device, which has no values: initialise the model")
        return tensor.resolve_neg()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's form. `strides`: None for the usual ones; kept, since results may depend on them by a rounding."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    on_accelerator: bool

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        strides = None
        if not tensor.is_contiguous():
            like = torch.empty_like(tensor, device="meta")
            strides = None if like.is_contiguous() else tuple(like.stride())
        return cls(tensor.dtype, tuple(tensor.shape), strides, tensor.device.type != "cpu")

    def empty(self, device: torch.device) -> Tensor:
        """Memory for such a tensor; on the CPU where the source's is."""
        place = device if self.on_accelerator else torch.device("cpu")
        if self.strides is None:
            return torch.empty(self.shape, dtype=self.dtype, device=place)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=place)

    def to_json(self) -> list[Any]:
        name = str(self.dtype).removeprefix("torch.")
        return [name, list(self.shape), self.strides and list(self.strides), self.on_accelerator]

    @classmethod
    def from_json(cls, value: Any, where: str) -> TensorSpec:
        if type(value) is not list or len(value) != 4:
            raise ValueError(f"{where} is {_shown(value)} where [dtype, shape, strides, on_accelerator] was expected")
        name, shape, strides, on_accelerator = value
        if type(name) is not str or name not in _DTYPES:
            raise ValueError(f"{where} has dtype {_shown(name)}, which this release of torch does not know")
        if type(on_accelerator) is not bool:
            raise ValueError(f"{where}: on_accelerator is {_shown(on_accelerator)} where true or false was expected")
        dimensions = _numbers(shape, f"{where}: shape")
        if math.prod(size for size in dimensions if size) > _MAX_ELEMENTS:
            raise ValueError(f"{where}: shape {_shown(shape)} is too large")
        steps = None if strides is None else _numbers(strides, f"{where}: strides")
        if steps is not None:
            _check_strides(dimensions, steps, where)
        return cls(_DTYPES[name], dimensions, steps, on_accelerator)


@dataclass(frozen=True)
class Manifest:
    """`tree`: what `plain_tree` encoded; the tensors in it are named t0, t1 and so on, in the table's order."""

    tree: Any
    specs: tuple[TensorSpec, ...]

    @property
    def state_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.specs)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> tuple[Manifest, list[Tensor]]:
        """The manifest of a state, and its tensors in the table's order. ValueError names what cannot be sent."""
        encoder = LiveEncoder()
        tree = encoder.encode(dict(state), "state")
        tensors = list(encoder.tensors.values())
        return cls(tree, tuple(map(TensorSpec.of, tensors))), tensors

    def to_bytes(self) -> bytes:
        table = [spec.to_json() for spec in self.specs]
        body = {"format_version": FORMAT_VERSION, "tensors": table, "tree": self.tree}
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes, *, state_bytes: int) -> Manifest:
        """Read what a source sent; ValueError says what is wrong. `state_bytes`: what it has announced."""
        try:
            body = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the manifest is not JSON as it is written here: {error}") from error
        if type(body) is not dict or body.get("format_version") != FORMAT_VERSION:
            version = body.get("format_version") if type(body) is dict else None
            raise ValueError(f"the manifest has format version {_shown(version)}; this release reads {FORMAT_VERSION}")
        if set(body) != {"format_version", "tensors", "tree"} or type(body["tensors"]) is not list:
            raise ValueError(
                f"the manifest has entries {_shown(sorted(body))}; expected: format_version, tensors, tree"
            )
        specs = tuple(TensorSpec.from_json(each, f"tensor {i}") for i, each in enumerate(body["tensors"]))
        manifest = cls(body["tree"], specs)
        if manifest.state_bytes != state_bytes:
            raise ValueError(f"the manifest's tensors have {manifest.state_bytes} bytes; announced were {state_bytes}")
        return manifest

    def state_with(self, tensors: list[Tensor]) -> dict[str, Any]:
        """The state, made of these tensors."""
        try:
            state = decode(self.tree, {f"t{index}": tensor for index, tensor in enumerate(tensors)})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"the manifest's tree cannot be read: {type(error).__name__}: {error}") from error
        if type(state) is not dict:
            raise ValueError(f"the manifest's tree is a {type(state).__name__} where a dict was expected")
        return state


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    valid = type(value) is list and len(value) <= _MAX_DIMENSIONS
    if not valid or any(type(each) is not int or not 0 <= each <= _MAX_ELEMENTS for each in value):
        raise ValueError(f"{what} is {_shown(value)}; allowed: at most {_MAX_DIMENSIONS} whole numbers from 0")
    return tuple(value)


def _check_strides(shape: tuple[int, ...], strides: tuple[int, ...], where: str) -> None:
    """Each element has a place of its own, and there are no others."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=False)):
        if size != 1:
            expected = expected * size if stride == expected else -1
    if len(strides) != len(shape) or expected <= 0:
        raise ValueError(f"{where}: strides {_shown(strides)} of shape {_shown(shape)} leave gaps or overlap")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _shown(value: Any) -> str:
    """Of what a peer sent, not more than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
