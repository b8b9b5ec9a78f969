"""Puts a checkpoint into the objects that it belongs to, whatever ranks wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stretto.checkpoint.catalogue import Catalogue, check
from stretto.checkpoint.errors import Damaged, reason_of
from stretto.checkpoint.index import Index, TensorForm, check_coverage, index_name
from stretto.checkpoint.manifest import FileEntry, Manifest
from stretto.checkpoint.name import CheckpointName
from stretto.checkpoint.shard_reader import ShardReader, TensorLoader
from stretto.checkpoint.snapshot import differences, group_differences, is_per_rank, references, unwrapped
from stretto.checkpoint.store import Store
from stretto.plain_tree import decode

_SHOWN = 20  # lines of differences in an error
_LARGE_BYTES = 1 << 20


class Contents:
    """One checkpoint's manifest and indices, read and checked; its tensors are still in the store."""

    def __init__(self, store: Store, name: CheckpointName) -> None:
        """Raises Damaged."""
        self._store = store
        self.name = name
        self.manifest: Manifest = Catalogue(store).manifest(name)
        self.indices = [self._index(rank) for rank in range(self.manifest.world_size)]
        check_coverage(self.indices)
        self.forms: dict[str, TensorForm] = {
            tensor: form for index in self.indices for tensor, form in index.tensors.items()
        }
        self.tree: dict[str, Any] = self.indices[0].tree
        if not isinstance(self.tree, dict):
            raise Damaged(f"{index_name(0)} has no state")
        for each in (self.tree, *(index.own for index in self.indices)):
            try:
                decode(each, self.forms)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Damaged(f"the state cannot be decoded: {type(error).__name__}: {error}") from error

    def saved_names(self) -> list[str]:
        """What the checkpoint holds."""
        return sorted({*self.tree, *self.indices[0].own})

    def tree_of(self, name: str, rank: int) -> Any:
        """One entry of the state, encoded. Where it differs by rank, and fewer ranks saved: one of theirs."""
        return self.tree[name] if name in self.tree else self.indices[rank % len(self.indices)].own[name]

    def check_against(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, with all that differs, unless the state is of the same kind."""
        missing = sorted(state.keys() - set(self.saved_names()))
        if missing:
            raise ValueError(
                f"checkpoint {self._store.at(str(self.name))} lacks {', '.join(missing)}; it holds "
                f"{', '.join(self.saved_names()) or 'nothing'}: ask for what it holds, or start without it"
            )
        lines = [
            f"{name}.{line}"
            for name, value in state.items()
            if isinstance(unwrapped(value), torch.nn.Module)
            for line in differences(unwrapped(value), self.tree_of(name, 0), self.forms)
        ]
        lines += [
            f"{name}.{line}"
            for name, value in state.items()
            if isinstance(getattr(value, "param_groups", None), list) and not is_per_rank(value)
            for line in group_differences(value, self.tree_of(name, 0), self.forms)
        ]
        if lines:
            shown = "\n  ".join([*lines[:_SHOWN], *([f"... and {len(lines) - _SHOWN} more"] if lines[_SHOWN:] else [])])
            raise ValueError(
                f"checkpoint {self._store.at(str(self.name))} is of another model; nothing was loaded:\n  {shown}\n"
                "build the model that it was written for, or give another folder"
            )

    def read(self, state: Mapping[str, Any], rank: int, world_size: int, *, threads: int) -> dict[str, Any]:
        """The values of the state's entries, tensors laid out as this rank's are. Raises Damaged.

        The ranks share the checking: only when all have read may any use what it has.
        """
        trees = {name: self.tree_of(name, rank) for name in state}
        layouts: dict[str, Tensor] = {}
        for name, value in state.items():
            layouts.update(_layouts(unwrapped(value), trees[name], self.forms))
        targets: dict[str, Any] = {}
        for tensor in {each for tree in trees.values() for each in references(tree)}:
            form = self.forms[tensor]
            if tensor in layouts:
                targets[tensor] = torch.empty_like(layouts[tensor], dtype=form.torch_dtype)
            else:
                targets[tensor] = torch.empty(form.shape, dtype=form.torch_dtype)
        self._fill(targets, rank, world_size, threads)
        return {name: decode(tree, targets) for name, tree in trees.items()}

    def _fill(self, targets: dict[str, Any], rank: int, world_size: int, threads: int) -> None:
        files: dict[str, FileEntry] = {name: entry for index in self.indices for name, entry in index.files.items()}
        mine = frozenset(name for number, name in enumerate(sorted(files)) if number % world_size == rank)
        reader = ShardReader(self._store, str(self.name), self.indices, files, checks=mine, threads=threads)
        planner, metadata = TensorLoader(), reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner.set_up_planner(targets, metadata, is_coordinator=True)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()

    def _index(self, rank: int) -> Index:
        file = index_name(rank)
        if file not in self.manifest.files:
            raise Damaged(f"the manifest knows no {file}")
        try:
            data = self._store.read(f"{self.name}/{file}")
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {reason_of(error, self._store.url)}") from error
        check(file, self.manifest.files[file], FileEntry.of(data))
        index = Index.decode(data, file)
        if any(self.manifest.files.get(name) != entry for name, entry in index.files.items()):
            raise Damaged(f"{file} and the manifest disagree about files")
        return index


def distribute(values: Mapping[str, Any], state: dict[str, Any], *, threads: int) -> None:
    """Give each object its state; plain values are replaced in the dict."""
    for name, value in state.items():
        target = unwrapped(value)
        if isinstance(target, torch.nn.Module):
            _give(target, values[name], threads)
        elif callable(getattr(target, "load_state_dict", None)):
            target.load_state_dict(values[name])
        else:
            state[name] = values[name]


def _give(module: torch.nn.Module, values: dict[str, Any], threads: int) -> None:
    """load_state_dict, large parameters by several threads: it finds in `values` what they hold already."""
    mine = dict(module.named_parameters(remove_duplicate=False))
    large = {
        key: parameter
        for key, parameter in mine.items()
        if isinstance(value := values.get(key), Tensor)
        and type(parameter) is torch.nn.Parameter
        and parameter.device.type == "cpu"
        and parameter.nbytes >= _LARGE_BYTES
        and (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
    }

    def copy(key: str) -> None:
        large[key].detach().copy_(values[key])
        values[key] = large[key]

    with ThreadPoolExecutor(threads, "stretto-copy") as pool:
        list(pool.map(copy, large))
    module.load_state_dict(values)


def _layouts(value: Any, tree: Any, forms: Mapping[str, TensorForm]) -> dict[str, Tensor]:
    """Saved tensors that this rank wants sharded, with a tensor that is sharded alike: a parameter, as a rule."""
    if is_per_rank(value):
        return {}
    names = decode(tree, {tensor: tensor for tensor in references(tree)})
    if isinstance(value, torch.nn.Module):
        here = value.state_dict()
        return {names[key]: each for key, each in here.items() if isinstance(each, DTensor) and key in names}
    if not hasattr(value, "param_groups") or not isinstance(names, dict):
        return {}
    parameters = [parameter for group in value.param_groups for parameter in group["params"]]
    found = {}
    for number, state in names.get("state", {}).items():
        parameter = parameters[number] if type(number) is int and number < len(parameters) else None
        if isinstance(parameter, DTensor):
            for tensor in state.values():
                if isinstance(tensor, str) and tensor in forms and forms[tensor].shape == tuple(parameter.shape):
                    found[tensor] = parameter.detach()
    return found
