"""A plain DDP loop of equal batches, each gain compared with gradients computed anew in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gain_oracle import GainOracle, Vector
from rank_scenarios import batch_of
from stretto import AdaScale
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import LR, backward, gradient_of, loss_of, make_model

ALONE: list[Any] = []  # a group for each rank, of itself
SIZE = 4


class Loop:
    """A DDP loop of equal batches beside its twin; `rel`: how close the gains must be."""

    def __init__(
        self,
        *,
        model: nn.Module | None = None,
        inner: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
        dtype: torch.dtype = torch.float64,
        rel: float = 1e-9,
        **options: Any,
    ) -> None:
        self.bare = model or make_model(dtype=dtype)
        self.dtype, self.rel = dtype, rel
        self.model = wrap(self.bare)
        self.inner = inner(self.bare) if inner else torch.optim.SGD(self.bare.parameters(), lr=LR)
        self.ada = AdaScale(self.inner, self.model, base_batch_size=SIZE, **options)
        self.oracle, self.step, self.tau = GainOracle(), 0, 0.0

    def batches(self, micro: int = 0) -> list[tuple[Tensor, Tensor]]:
        """This step's, of all ranks."""
        drawn = [batch_of(self.step, rank, micro, SIZE) for rank in range(dist.get_world_size())]
        return [(x.to(self.dtype), y.to(self.dtype)) for x, y in drawn]

    def expect(self, gradients: list[Vector]) -> float:
        scale = float(len(gradients))
        self.oracle.update([SIZE] * len(gradients), gradients, scale)
        gain = self.oracle.gain(scale)
        self.tau += gain
        return gain

    def check(self, gain: float) -> None:
        assert self.ada.gain == pytest.approx(gain, rel=self.rel)
        assert self.ada.tau == pytest.approx(self.tau, rel=self.rel)
        self.step += 1

    def take(self, steps: int = 3, **how: Any) -> None:
        for _ in range(steps):
            self.take_one(**how)
        assert self.oracle.gain(2.0) > 1.0

    def take_one(
        self,
        *,
        clear: Callable[[AdaScale], None] = AdaScale.zero_grad,
        between: Callable[[Loop], None] | None = None,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """zero_grad, forward, backward, what comes between, step; then the gain is compared."""
        batches = self.batches()
        with context():
            gain = self.expect([gradient_of(self.bare, batch) for batch in batches])
        clear(self.ada)
        with context():
            loss = loss_of(self.model, batches[dist.get_rank()])
        backward(scaler.scale(loss) if scaler else loss)
        if between:
            between(self)
        if scaler:
            scaler.step(self.ada)
            scaler.update()
        else:
            self.ada.step()
        self.check(gain)


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: DistributedDataParallel(model, **options)
