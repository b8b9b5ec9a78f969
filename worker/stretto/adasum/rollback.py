"""Parameters and optimizer state as they were before a step, in memory that is kept from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Rollback:
    """Of one optimizer. `keep` before its step; then `moves`, and either `move` or `restore`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.parameters: list[Tensor] = []
        self._starts: list[Tensor] = []
        self._moves: list[Tensor] = []
        self._state: dict[Tensor, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Note parameters, their state, and what groups count."""
        groups = self._optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        if [id(p) for p in parameters] != [id(p) for p in self.parameters]:
            self.parameters = parameters
            self._starts, self._moves = _flat_views(parameters), _flat_views(parameters)
        torch._foreach_copy_(self._starts, parameters)
        state = self._optimizer.state
        self._state = {
            parameter: _kept(self._state.get(parameter, {}), state[parameter])
            for parameter in parameters
            if parameter in state
        }
        self._groups = [_kept({}, {k: v for k, v in group.items() if k != "params"}) for group in groups]

    @torch.no_grad()
    def moves(self) -> list[Tensor]:
        """By how much the step has moved each parameter; may be overwritten."""
        torch._foreach_copy_(self._moves, self.parameters)
        torch._foreach_sub_(self._moves, self._starts)
        return self._moves

    @torch.no_grad()
    def move(self) -> None:
        """Put every parameter where its move leads from its start."""
        torch._foreach_add_(self._moves, self._starts)
        torch._foreach_copy_(self.parameters, self._moves)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the step."""
        torch._foreach_copy_(self.parameters, self._starts)
        state = self._optimizer.state
        for parameter in self.parameters:
            if parameter not in self._state:
                state.pop(parameter, None)
                continue
            before, now = self._state[parameter], state[parameter]
            for name in [*now]:
                if name not in before:
                    del now[name]
            _put_back(now, before)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, before)


def _flat_views(tensors: list[Tensor]) -> list[Tensor]:
    """Memory for such tensors, those of one dtype and device one after the other."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
    views: list[Tensor] = [torch.empty(0)] * len(tensors)
    for (dtype, device), indices in kinds.items():
        sizes = [tensors[index].numel() for index in indices]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        for index, part in zip(indices, torch.split(flat, sizes), strict=True):
            views[index] = part.view(tensors[index].shape)
    return views


def _kept(memory: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values, their tensors copied, into `memory` where it has some of the same form."""
    kept = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            old = memory.get(name)
            same = isinstance(old, Tensor) and (old.shape, old.dtype) == (value.shape, value.dtype)
            kept[name] = old.copy_(value) if same and old is not None else value.detach().clone()
        else:
            kept[name] = value
    return kept


def _put_back(target: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        here = target.get(name)
        if isinstance(value, Tensor) and isinstance(here, Tensor) and here.shape == value.shape:
            here.copy_(value)
        else:
            target[name] = value
