"""Random numbers that depend on where a step or a sample stands, and not on what happened before.

A restart, a rollback or another number of workers then changes nothing: dropout draws from (seed, step, rank),
augmentation from (seed, epoch, sample).
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


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


class RandomState:
    """Where random, NumPy and torch stand, to be saved with a loop of one's own; each rank has its own.

    A rank that did not save (more ranks load than did) goes on from another's state and its own rank.
    """

    per_rank = True

    def state_dict(self) -> dict[str, Any]:
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "rank": _rank(),
            "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(gauss)],
            "torch": torch.get_rng_state(),
            "cuda": [state.clone() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, d: dict[str, Any]) -> None:
        kind, keys, position, has_gauss, gauss = d["numpy"]
        random.setstate(d["python"])
        np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
        torch.set_rng_state(d["torch"])
        if d["cuda"] and torch.cuda.is_available():
            for device, state in enumerate(d["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
        if d["rank"] != _rank():
            seed_step(torch.initial_seed() ^ random.getrandbits(62), 0, _rank(), 0)
            random.seed(torch.initial_seed())
            np.random.seed(torch.initial_seed() % 2**32)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
