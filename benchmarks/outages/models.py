"""The models that both sides train."""

from __future__ import annotations

import torch

INPUTS, OUTPUTS, BATCH = 64, 8, 16


def make_model(parameters: int) -> torch.nn.Module:
    """Three linear layers with about so many parameters."""
    width = max(INPUTS, round(parameters**0.5))
    return torch.nn.Sequential(
        torch.nn.Linear(INPUTS, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, OUTPUTS),
    )
