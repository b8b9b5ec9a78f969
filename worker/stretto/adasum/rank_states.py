"""Optimizer states that differ from rank to rank: through changes of membership, and in checkpoints.

The policy: who goes on keeps its own state; who joins gets the mean of those that go on; the state of who leaves is
gone with it. A checkpoint holds every rank's: a member that is back under its name gets its own again, others get what
is left over, in order, and the mean when nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from stretto.adasum.transport import Transport
from stretto.adasum.tree import Floats
from stretto.transfer.manifest import Manifest
from stretto.transfer.memory import flat_bytes

_LENGTH_BYTES = 8

State = dict[Any, dict[str, Any]]


class RankStates:
    """Of one rank's `optimizer`. Part of what is saved and handed on; empty but while it is restored or saved."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._members: list[str] = []
        self._states: list[State] = []
        self._own: dict[Tensor, dict[str, Any]] | None = None
        self._settled = False

    def state_dict(self) -> dict[str, Any]:
        return {"members": list(self._members), "states": list(self._states)}

    def load_state_dict(self, d: dict[str, Any]) -> None:
        self._members, self._states = list(d["members"]), list(d["states"])

    def keep(self) -> None:
        """Before the ranks' shared state is loaded: note this rank's own, if it has been part of a generation."""
        self._own = dict(self._optimizer.state) if self._settled else None

    def settle(self, members: Sequence[str], transport: Transport, *, loaded: bool) -> None:
        """Give this rank its state in a new generation. members: by rank. loaded: one rank's state was given to all."""
        if self._members:
            chosen = choose(self._members, members)[transport.rank]
            self._load(self._states[chosen] if chosen is not None else mean_of(self._states))
        elif loaded:
            self._share(transport)
        self.forget()
        self._own, self._settled = None, True

    def gather(self, members: Sequence[str], transport: Transport) -> None:
        """Collect every rank's state, on every rank, for a checkpoint that the ranks share out; all ranks call it."""
        payload = _packed(self._optimizer.state_dict()["state"])
        sizes = np.zeros(transport.world_size, dtype=np.int64)
        sizes[transport.rank] = payload.numel()
        transport.sum_(sizes)
        bounds = [0, *np.cumsum(sizes).tolist()]
        flat = torch.empty(bounds[-1], dtype=torch.uint8)
        flat[bounds[transport.rank] : bounds[transport.rank + 1]] = payload
        transport.share(flat, bounds)
        self._members = list(members)
        self._states = [_unpacked(part) for part in torch.split(flat, sizes.tolist())]

    def forget(self) -> None:
        """The checkpoint is written, or its states are given out."""
        self._members, self._states = [], []

    def _share(self, transport: Transport) -> None:
        """The optimizer holds the state that was given to all: those with one of their own go back to it."""
        own, state = self._own, self._optimizer.state
        holders = np.array([float(own is not None)])
        transport.sum_(holders)
        if 0 < holders[0] < transport.world_size:
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    for name in sorted(state.get(parameter, {})):
                        given = state[parameter][name]
                        if isinstance(given, Tensor) and given.is_floating_point():
                            mine = None if own is None else own.get(parameter, {}).get(name)
                            mean = _sum(mine, given, transport) / holders[0]
                            if own is None:
                                given.copy_(torch.from_numpy(mean).view(given.shape))
        if own is not None:
            state.clear()
            state.update(own)

    def _load(self, state: State) -> None:
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def choose(saved: Sequence[str], members: Sequence[str]) -> list[int | None]:
    """Of each member, by rank: which saved state it gets; None: the mean of all."""
    places = {name: index for index, name in enumerate(saved)}
    left_over = [index for index, name in enumerate(saved) if name not in members]
    return [places[name] if name in places else left_over.pop(0) if left_over else None for name in members]


def mean_of(states: Sequence[State]) -> State:
    """Floating tensors as means over those that have them, everything else as the first has it."""
    merged: State = {}
    for state in states:
        for parameter, entries in state.items():
            for name, value in entries.items():
                if name in merged.setdefault(parameter, {}):
                    continue
                if isinstance(value, Tensor) and value.is_floating_point():
                    values = [each[parameter][name].double() for each in states if name in each.get(parameter, {})]
                    value = torch.stack(values).mean(dim=0).to(value.dtype)
                merged[parameter][name] = value
    return merged


def _sum(own: Tensor | None, like: Tensor, transport: Transport) -> Floats:
    """Added up over the ranks; one that lacks the entry counts as zero."""
    numbers = np.zeros(like.numel())
    if own is not None:
        numbers[:] = own.detach().double().cpu().numpy().reshape(-1)
    transport.sum_(numbers)
    return numbers


def _packed(state: State) -> Tensor:
    """One vector of bytes: a length, the manifest, the tensors."""
    manifest, tensors = Manifest.of({"state": state})
    head = manifest.to_bytes()
    parts = [torch.frombuffer(bytearray(len(head).to_bytes(_LENGTH_BYTES, "little") + head), dtype=torch.uint8)]
    return torch.cat(parts + [flat_bytes(tensor.detach().cpu().contiguous()) for tensor in tensors])


def _unpacked(data: Tensor) -> State:
    length = int.from_bytes(bytes(data[:_LENGTH_BYTES].numpy()), "little")
    body = data[_LENGTH_BYTES + length :]
    manifest = Manifest.from_bytes(bytes(data[_LENGTH_BYTES:][:length].numpy()), state_bytes=body.numel())
    tensors, start = [], 0
    for spec in manifest.specs:
        raw = body[start : start + spec.size_bytes].clone()
        tensors.append(raw.view(spec.dtype).view(spec.shape))
        start += spec.size_bytes
    state: State = manifest.state_with(tensors)["state"]
    return state
