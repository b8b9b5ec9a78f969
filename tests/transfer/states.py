"""States to send: every kind of value, and training objects at different points of their lives."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from stretto import AdaScale, ElasticSampler
from torch import Tensor, nn

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def mixed_state(seed: int) -> dict[str, Any]:
    """Other values, shapes and keys for each seed: dtypes, strides, empty and tied tensors, what JSON cannot say."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(-100, 100, shape, generator=generator).to(dtype)

    tied = random(3, 5 + seed)
    base = random(12, 10)
    return {
        "plain": {"seed": seed, "nan": float("nan"), 7: ("tuple", None, True), "text": "ü\n", "set": {"a", "b", "c"}},
        "kinds": [Counter({30: 1}), OrderedDict(b=1, a=random(2)), torch.Size([1, 2]), torch.bfloat16, b"\x00\xff"],
        "dtypes": {str(dtype): random(4, seed + 2, dtype=dtype) for dtype in DTYPES},
        "odd": [torch.tensor(float(seed)), torch.empty(0), torch.empty(3, 0, 2), torch.tensor(-0.0), random(1)],
        "tied": {"one": tied, "other": tied},
        "strided": {
            "turned": base.t(),
            "part": base[2:9, 1::3],
            "channels_last": random(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "wide": torch.tensor([1.5, 2.5]).expand(3, 2),
        },
        # Beyond the size at which tensors travel from their own memory.
        "large": random(300_001 + seed, dtype=torch.float64),
        "large_turned": random(700, 501, dtype=torch.float64).t(),
        "large_part": random(600, 800, dtype=torch.float64)[:, ::2],
        **({"only_here": random(5)} if seed % 2 else {}),
    }


def same_bits(a: Any, b: Any) -> bool:
    """Whether two values are equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
            return False
        return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(k == j and same_bits(v, w) for (k, v), (j, w) in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_bits(v, w) for v, w in zip(a, b, strict=False))
    return bool(a == b or (a != a and b != b))


def training_objects(seed: int, steps: int, *, momentum: float = 0.9) -> dict[str, Any]:
    """Model with tied weights and buffers, AdaScale with scheduler, sampler, GradScaler: after so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight = model[0].weight
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(inner, [2, 5])
    optimizer = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, scheduler=scheduler)
    objects = {
        "model": model,
        "optimizer": optimizer,
        "sampler": ElasticSampler(100, seed=seed),
        "scaler": torch.amp.GradScaler("cpu"),
    }
    for step in range(steps):
        train_step(objects, seed * 100 + step)
    return objects


def train_step(objects: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, optimizer = objects["model"], objects["optimizer"]
    optimizer.zero_grad()
    for _ in range(2):
        loss = model(torch.randn(4, 8, generator=generator)).square().mean() / 2
        loss.backward()
    optimizer.step()
    objects["sampler"].advance(8)


def state_of(objects: dict[str, Any]) -> dict[str, Any]:
    return {name: each.state_dict() for name, each in objects.items()}
