"""A small training state, and ways to move it on and to damage its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from stretto import AdaScale
from torch import nn

WAYS = ("remove", "truncate", "empty", "flip a bit", "append")


def training_state(seed: int = 0) -> dict[str, Any]:
    """A model with buffers, AdamW under AdaScale with a schedule, and a plain value."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(inner, [1, 3])
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, scheduler=scheduler)
    return {"model": model, "optimizer": ada, "note": {"seen": 0}}


def train(state: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state["optimizer"].zero_grad()
    for _ in range(2):
        state["model"](torch.randn(4, 3, generator=generator)).square().mean().div(2).backward()
    state["optimizer"].step()
    state["note"]["seen"] += 1


def damage(path: Path, how: str, at: float = 0.5) -> None:
    """at: where in the file, as a fraction of its length."""
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, int(path.stat().st_size * at))
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "append":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        content = bytearray(path.read_bytes())
        content[min(int(len(content) * at), len(content) - 1)] ^= 1
        path.write_bytes(content)
