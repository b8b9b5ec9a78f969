"""A training state taken apart: tensors by name, and a tree of everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stretto.checkpoint.index import DTYPES, TensorForm
from stretto.plain_tree import TreeEncoder, decode

_STEP = re.compile(r"\[('.*?'|\".*?\"|[^\]]*)\]")


class Snapshot:
    """`tensors`: the live ones, not copied, sharded ones as DTensor. `tree`, `own`: JSON values that refer to them.
    `owners`: the rank that writes a tensor whole, where the ranks' may differ: rank 0 for modules' buffers.

    A value is an object with state_dict(), or a plain nested value. What says `per_rank = True` is each rank's own;
    everything else is taken to be the same on all ranks.
    """

    def __init__(self, state: Mapping[str, Any], rank: int) -> None:
        encoder = _Encoder()
        self.tensors = encoder.tensors
        self.tree = {
            name: encoder.encode(contents(value), f"state[{name!r}]")
            for name, value in state.items()
            if not is_per_rank(value)
        }
        self.owners = {
            buffer: 0
            for name, value in state.items()
            if isinstance(unwrapped(value), torch.nn.Module)
            for buffer in self._buffers(unwrapped(value), self.tree[name])
        }
        shared, encoder.prefix = set(self.tensors), f"rank-{rank}."
        self.own = {
            name: encoder.encode(contents(value), f"state[{name!r}]")
            for name, value in state.items()
            if is_per_rank(value)
        }
        self.owners.update({name: rank for name in self.tensors if name not in shared})

    def _buffers(self, module: torch.nn.Module, tree: Any) -> Iterator[str]:
        """The names of what the module keeps beside its parameters."""
        parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
        for key, name in decode(tree, {name: name for name in self.tensors}).items():
            if key not in parameters and name in self.tensors:
                yield name


class _Encoder(TreeEncoder):
    """Names tensors by their place, and keeps them as they are."""

    prefix = ""

    def _store(self, tensor: Tensor, where: str) -> str:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{where} has dtype {tensor.dtype}; store its parts as real tensors of a plain dtype")
        if not isinstance(tensor, DTensor):
            return super()._store(tensor, where)
        identity = (id(tensor),)
        if identity not in self._seen:
            name = self._named(where)
            self.tensors[name] = tensor.detach()
            self._seen[identity] = (name, tensor)
        return self._seen[identity][0]

    def _named(self, where: str) -> str:
        parts = [match[1].strip("'\"") for match in _STEP.finditer(where)]
        plain = name = self.prefix + ".".join(parts)
        number = 2
        while name in self.tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
            name, number = f"{plain}#{number}", number + 1
        return name

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor


def is_per_rank(value: Any) -> bool:
    return bool(getattr(value, "per_rank", False))


def contents(value: Any) -> Any:
    """What of a value is saved."""
    value = unwrapped(value)
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def unwrapped(value: Any) -> Any:
    """The module itself: a wrapper for one world would change its names."""
    return value.module if isinstance(value, DistributedDataParallel) else value


def form_of(tensor: Tensor) -> TensorForm:
    return TensorForm(DTYPES[tensor.dtype], tuple(tensor.shape))


def references(tree: Any) -> Iterator[str]:
    """The names of the tensors that an encoded tree needs."""
    if isinstance(tree, list):
        for item in tree:
            yield from references(item)
    elif isinstance(tree, dict):
        if type(tree.get("$tensor")) is str:
            yield tree["$tensor"]
        else:
            for item in tree.values():
                yield from references(item)


def differences(module: torch.nn.Module, tree: Any, forms: Mapping[str, TensorForm]) -> list[str]:
    """How a saved module differs from this one: names, shapes and dtypes, a line each."""
    saved = decode(tree, forms)
    if not isinstance(saved, dict):
        return ["what is saved is no module"]
    mine = {key: form_of(each) for key, each in module.state_dict().items() if isinstance(each, Tensor)}
    theirs = {key: each for key, each in saved.items() if isinstance(each, TensorForm)}
    lines = [f"{key}: not in the checkpoint" for key in mine if key not in theirs]
    lines += [f"{key}: in the checkpoint only" for key in theirs if key not in mine]
    lines += [
        f"{key}: {mine[key]} here, {theirs[key]} in the checkpoint"
        for key in mine
        if key in theirs and mine[key] != theirs[key]
    ]
    return lines


def group_differences(optimizer: Any, tree: Any, forms: Mapping[str, TensorForm]) -> list[str]:
    """How a saved optimizer's groups of parameters differ from this one's, a line each."""
    saved = decode(tree, forms)
    theirs = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(theirs, list) or not all(isinstance(group, dict) for group in theirs):
        return []  # an optimizer that says it in its own way
    mine = optimizer.param_groups
    if len(mine) != len(theirs):
        return [f"param_groups: {len(mine)} here, {len(theirs)} in the checkpoint"]
    counts = [(len(group["params"]), len(other.get("params", ()))) for group, other in zip(mine, theirs, strict=True)]
    return [
        f"param_groups[{number}]: {here} parameters here, {there} in the checkpoint"
        for number, (here, there) in enumerate(counts)
        if here != there
    ]
