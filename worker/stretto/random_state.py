"""Random numbers that depend on where a step or a sample stands, and not on what happened before.

A restart, a rollback or another number of workers then changes nothing: dropout draws from (seed, step, rank),
augmentation from (seed, epoch, sample).
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Seed torch for one micro-batch of a step of one rank."""
    torch.manual_seed(_mixed("step", seed, step, rank, micro_batch))


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed torch, random and NumPy before one sample is read (and perhaps augmented)."""
    mixed = _mixed("sample", seed, epoch, index)
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def _mixed(*parts: str | int) -> int:
    """63 bits from all parts; neighbouring numbers give unrelated ones."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
