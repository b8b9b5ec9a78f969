"""What a live worker does before it asks for a place, so that those who train wait for it as little as possible."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel imports it when it is first made, which takes seconds
from torch.utils.data import Dataset

from stretto.feed import Feed, Share
from stretto.sampler import ElasticSampler
from stretto.step import LossFunction
from stretto.trainer_settings import TrainerSettings

# Options of a loader without children.
_PLAIN_OPTIONS = ("collate_fn", "pin_memory", "pin_memory_device")


def warm_up(
    model: torch.nn.Module,
    loss_fn: LossFunction,
    dataset: Dataset[Any],
    batch_size: int,
    settings: TrainerSettings,
    device: torch.device,
) -> None:
    """Run one batch forward and backward, and forget what came of it: kernels are chosen then, and models compiled."""
    sampler = ElasticSampler(len(dataset), seed=settings.seed, shuffle=settings.shuffle)  # type: ignore[arg-type]
    feed = Feed(
        dataset,
        sampler,
        Share(rank=0, world_size=1, size=batch_size, batch_size=batch_size),
        seed=settings.seed,
        options={name: value for name, value in settings.dataloader.items() if name in _PLAIN_OPTIONS},
        device=device,
    )
    kept = [buffer.detach().clone() for buffer in model.buffers()]
    try:
        for _, batch in feed.next_step()[1]:
            with settings.mixed_precision.casting(device):
                loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    finally:
        feed.close()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)
