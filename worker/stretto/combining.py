"""How the trainer's ranks combine what they have found: by a mean, or by Adasum of gradients or of moves."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from stretto import rules
from stretto.adasum.ddp import HookState, ddp_hook, local_hook
from stretto.adasum.delta import DeltaOptimizer
from stretto.adasum.rank_states import RankStates
from stretto.adasum.reducer import Alone, Reducer
from stretto.adasum.transport import TorchTransport, Transport
from stretto.adasum.tree import Leaves
from stretto.live import Generation
from stretto.live.exchange import LiveTransport
from stretto.world import World

Members = tuple[tuple[str, int], ...]


class Combining:
    """What a rule asks for beyond AdaScale; nothing where that is a mean. One per trainer.

    In each generation: `before_synchronise`, `after_synchronise`, then `options` for AdaScale's `rebind`.
    """

    def __init__(self, rule: str | rules.Rule, optimizer: Optimizer, mean_in_node: bool) -> None:
        self._rule = rules.named(rule)
        self._mean_in_node = mean_in_node
        self._delta: DeltaOptimizer | None = None
        if self._rule is rules.adasum_delta:
            self._delta = optimizer if isinstance(optimizer, DeltaOptimizer) else DeltaOptimizer(optimizer)
        # What AdaScale goes around.
        self.optimizer = self._delta or optimizer
        self._states = RankStates(self._delta.optimizer) if self._delta is not None else None
        self._hook: HookState | None = None
        self._transport: Transport = Alone()
        self._names: list[str] = []

    @property
    def per_rank(self) -> bool:
        """Whether the ranks' optimizer states differ."""
        return self._states is not None

    def state(self) -> dict[str, Any]:
        """What is saved and handed on for it, by name."""
        return {} if self._states is None else {"rank_states": self._states}

    def before_synchronise(self) -> None:
        if self._states is not None:
            self._states.keep()

    def after_synchronise(self, world: World | Generation, device: torch.device) -> None:
        """Find the way to the other ranks, and this rank's own state."""
        self._hook = None
        self._transport = Alone()
        if self._rule not in (rules.adasum, rules.adasum_delta):
            return
        if isinstance(world, Generation) and world.world_size > 1:
            self._transport = LiveTransport(world, device)
        elif world.world_size > 1:
            group = dist.group.WORLD
            assert group is not None, "a world of several ranks has a process group"
            self._transport = TorchTransport(group)
        members = world.members
        self._names = [f"{node}/{worker}" for node, worker in members]
        reducer = Reducer(self._transport, "gram", leaves_of(members, mean_in_node=self._mean_in_node))
        if self._delta is None or self._states is None:
            self._hook = HookState(reducer=reducer)
            return
        self._delta.rebind(reducer)
        loaded = isinstance(world, Generation) and world.world_size > 1 and not world.in_step
        self._states.settle(self._names, self._transport, loaded=loaded)

    def options(self) -> dict[str, Any]:
        """Of AdaScale's rebind."""
        if self._hook is not None:
            return {"comm_hook": (self._hook, ddp_hook)}
        return {} if self._delta is None else {"comm_hook": (None, local_hook)}

    def gather(self) -> None:
        """Collect what a checkpoint needs of every rank; all ranks call it, before they save."""
        if self._states is not None:
            self._states.gather(self._names, self._transport)

    def saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state as a checkpoint takes it, after `gather`: ranks share it out, so it has to be the same on all."""
        if not self.per_rank:
            return state
        return {**state, "optimizer": {**state["optimizer"].state_dict(), "state": {}}}

    def written(self) -> None:
        """The checkpoint is written."""
        if self._states is not None:
            self._states.forget()

    def shared(self, state: dict[str, Any]) -> dict[str, Any]:
        """What has to be the same on every rank, of the entries of a state but the model."""
        bits = {name: value.state_dict() for name, value in state.items() if name != "model"}
        if self.per_rank:
            bits["optimizer"] = {name: value for name, value in bits["optimizer"].items() if name != "state"}
            # Each rank's losses are scaled by its own.
            bits.pop("grad_scaler", None)
        return bits

    def orthogonality(self) -> tuple[float, ...]:
        """Of the latest step: minimum, median and maximum over the layers; empty without Adasum or gradients."""
        found = None
        if self._delta is not None:
            found = self._delta.statistics.quantiles()
        elif self._hook is not None:
            found = self._hook.statistics.quantiles()
        return found or ()


def leaves_of(members: Members, *, mean_in_node: bool) -> Leaves:
    """The ranks as Adasum's tree takes them: by node id and the worker's number there, whatever their ranks are."""
    order = sorted(range(len(members)), key=lambda rank: members[rank])
    if not mean_in_node:
        return tuple((rank,) for rank in order)
    nodes: dict[str, list[int]] = {}
    for rank in order:
        nodes.setdefault(members[rank][0], []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())
