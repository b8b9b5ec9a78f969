"""One switch between AdaScale's scaling and Adasum: a rule goes with one kind of hook and of optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stretto import rules
from stretto.adasum.ddp import HookState, ddp_hook, local_hook
from stretto.adasum.delta import DeltaOptimizer


def check_optimizer(rule: rules.Rule, optimizer: Optimizer) -> None:
    """Raise ValueError where the rule and the optimizer would scale twice, or not at all."""
    delta = isinstance(optimizer, DeltaOptimizer)
    if delta and rule is not rules.adasum_delta:
        raise ValueError(
            'optimizer is a DeltaOptimizer, so the rule is "adasum-delta"; with any other rule the learning rate would '
            "be scaled as well"
        )
    if rule is rules.adasum_delta and not delta:
        raise ValueError(
            f'rule "adasum-delta" combines moves, and the optimizer is a {type(optimizer).__name__}: pass '
            "stretto.adasum.DeltaOptimizer(optimizer); ElasticTrainer does it by itself"
        )


def scheduled(optimizer: Optimizer) -> Optimizer:
    """Whose learning rate a scheduler moves."""
    return optimizer.optimizer if isinstance(optimizer, DeltaOptimizer) else optimizer


def hook_for(rule: rules.Rule, module: torch.nn.Module, hook: Any) -> Any:
    """The communication hook that the rule goes with: the given one, or the rule's own where none is given."""
    function = hook[1] if isinstance(hook, tuple) else hook
    ours = ddp_hook if rule is rules.adasum else local_hook if rule is rules.adasum_delta else None
    if ours is None:
        if function in (ddp_hook, local_hook):
            raise ValueError(
                "comm_hook is Adasum's, and the rule scales the learning rate too: one of them only; take rule "
                '"adasum" (or "adasum-delta"), or no hook'
            )
        return hook
    if function not in (None, ours):
        raise ValueError("comm_hook is another one, and the rule combines gradients by Adasum: give one of them only")
    if rule is rules.adasum and not (isinstance(hook, tuple) and isinstance(hook[0], HookState)):
        # By Gram matrices, which show AdaScale's norms beside.
        if not isinstance(module, DistributedDataParallel):
            return None
        group: dist.ProcessGroup = module.process_group
        return HookState(group, algorithm="gram"), ddp_hook
    return hook or (None, local_hook)
