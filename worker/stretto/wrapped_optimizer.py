"""An optimizer around another one: to torch, and to schedulers and GradScalers, it is that one."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class WrappedOptimizer(Optimizer):
    """Shares groups, state and defaults with `optimizer`; hooks, and the profiler's names, are its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._inner = optimizer
        # Sets up the hooks and profiling of a torch optimizer; its __init__ would copy groups that are
        # shared here.
        super().__setstate__({})

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # torch declares an attribute
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # torch declares an attribute
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # torch declares an attribute
        return self._inner.defaults
