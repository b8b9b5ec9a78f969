"""Rank 0's state on every rank of torch's default group: JSON and plain tensors, nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.plain_tree import TreeEncoder, decode


def broadcast(value: Any, device: torch.device) -> Any:
    """Rank 0's nested value, on every rank; the others' are ignored. device: where the group's tensors have to be.

    Raises ValueError on rank 0, naming the place, for what plain state cannot hold. All ranks call it together.
    """
    first, encoder, text = dist.get_rank() == 0, TreeEncoder(), b""
    if first:
        tree = encoder.encode(value, "state")
        forms = [[name, str(each.dtype).removeprefix("torch."), each.shape] for name, each in encoder.tensors.items()]
        text = json.dumps([tree, forms]).encode()
    length = int(_send(torch.tensor(len(text)), device))
    body = torch.frombuffer(bytearray(text), dtype=torch.uint8) if first else torch.empty(length, dtype=torch.uint8)
    tree, forms = json.loads(_send(body, device).numpy().tobytes())
    tensors = {}
    for name, dtype, shape in forms:
        held = encoder.tensors[name] if first else torch.empty(shape, dtype=getattr(torch, dtype))
        if held.numel():
            held = _send(held.reshape(-1).view(torch.uint8), device).view(held.dtype).view(shape)
        tensors[name] = held
    return value if first else decode(tree, tensors)


def _send(data: Tensor, device: torch.device) -> Tensor:
    """Rank 0's bytes, in memory of the host."""
    there = data.to(device)
    dist.broadcast(there, src=0)
    return there.cpu()
