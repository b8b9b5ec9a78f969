"""A checkpoint's model as one plain safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stretto.checkpoint.loading import Contents
from stretto.checkpoint.name import CheckpointName
from stretto.checkpoint.store import Store


class _Wanted:
    """Takes whatever is saved under a name."""


def export(store: Store, name: CheckpointName, file: str | os.PathLike[str], *, entry: str = "model") -> int:
    """Write one entry's tensors under their own names, in the entry's own shapes; returns how many.

    Every byte is checked first. Raises Damaged, and ValueError for an entry that is not there or has no names.
    """
    contents = Contents(store, name)
    if entry not in contents.saved_names():
        raise ValueError(
            f"{name} has no entry {entry}; it holds {', '.join(contents.saved_names()) or 'nothing'}: name one of these"
        )
    found = contents.read({entry: _Wanted()}, 0, 1, threads=2)[entry]
    tensors = _named(found) if isinstance(found, Mapping) else {}
    if not tensors:
        raise ValueError(f"{entry} of {name} has no tensors by name; a model's state has")
    metadata = {"step": str(name.step), "generation": str(name.generation), "tau": repr(contents.manifest.tau)}
    save_file(tensors, file, metadata=metadata)
    return len(tensors)


def _named(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tied weights become tensors of their own: the format holds no references."""
    seen: set[int] = set()
    tensors = {}
    for key, value in found.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    return tensors
