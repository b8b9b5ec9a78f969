"""Options of ElasticTrainer that most users leave alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stretto.adascale_options import AdaScaleSettings
from stretto.feed import check_options
from stretto.live import LiveSettings
from stretto.mixed_precision import MixedPrecision
from stretto.session import SessionSettings


@dataclass(frozen=True)
class TrainerSettings:
    """Each limit has its unit in its name."""

    # Of the sample order and of all random numbers in steps and samples.
    seed: int = 0
    shuffle: bool = True
    # Checkpoints between planned ones: at most this much work is done again after a failure. They are written while
    # training goes on, and begin early enough to be done in time; where one is not, training waits. None: not by time.
    checkpoint_interval_s: float | None = 10.0
    # ... and, or instead, at most so many steps, or so much progress in tau.
    checkpoint_interval_steps: int | None = None
    checkpoint_interval_tau: float | None = None
    # Options of torch's DataLoader: num_workers, collate_fn, pin_memory, prefetch_factor, worker_init_fn, ...
    dataloader: Mapping[str, Any] = field(default_factory=dict)
    # Options of DistributedDataParallel: find_unused_parameters, bucket_cap_mb, ...
    ddp: Mapping[str, Any] = field(default_factory=dict)
    # None: this rank's GPU, or the CPU where there is none.
    device: str | None = None
    # Of the process group. None: nccl on GPUs, gloo on CPUs. In in-process mode these two, and nccl for tensors on the
    # worker's own GPU alone.
    backend: str | None = None
    # A collective that takes longer fails. Longer than the slowest step and the longest checkpoint.
    collective_timeout_s: float = 120.0
    # So many steps in a row whose gradient is not finite end the training with an error.
    max_skipped_steps: int = 100
    # Outside in-process mode: ranks that call trainer.save() wait so long for the others to do so.
    save_meeting_s: float = 5.0
    # Where there is no controller, a worker with SIGTERM has this long to save at a step boundary.
    sigterm_grace_s: float = 20.0
    # A file that gets every committed step's sample indices, as JSON lines (stretto.sample_log).
    sample_log: str | os.PathLike[str] | None = None
    # Objects with state_dict and load_state_dict that are saved, and handed on to joiners, by name.
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    # Autocast and the GradScaler, whose state is part of the state.
    mixed_precision: MixedPrecision = field(default_factory=MixedPrecision)
    # Rule "adasum" or "adasum-delta": average inside each node first, and combine nodes by Adasum.
    adasum_mean_in_node: bool = False
    # In-process mode: a forward and a backward pass before anyone waits for this worker.
    warm_up: bool = True
    # In-process mode: compare all ranks' states, bit by bit, at the beginning of each generation.
    verify: bool = True
    live: LiveSettings = field(default_factory=LiveSettings)
    session: SessionSettings = field(default_factory=SessionSettings)
    # target_tau is filled in by the trainer.
    adascale: AdaScaleSettings = field(default_factory=AdaScaleSettings)

    def validate(self) -> None:
        """Raise ValueError for a value that makes no sense."""
        self.session.validate()
        self.live.validate()
        self.mixed_precision.validate()
        check_options(self.dataloader)
        for name in (
            "checkpoint_interval_s",
            "checkpoint_interval_steps",
            "checkpoint_interval_tau",
            "collective_timeout_s",
            "max_skipped_steps",
            "save_meeting_s",
            "sigterm_grace_s",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")

    def named_state(self) -> dict[str, Any]:
        """What is saved and handed on beside the trainer's own: extra_state, and the GradScaler."""
        scaler = self.mixed_precision.grad_scaler
        scaled = {} if scaler is None or not scaler.is_enabled() else {"grad_scaler": scaler}
        return {**self.extra_state, **scaled}


def check_sizes(base_batch_size: int, batch_size: int, global_batch_size: int | None, target_tau: float) -> None:
    """Raise ValueError for sizes of ElasticTrainer that make no sense."""
    sizes = {"base_batch_size": base_batch_size, "batch_size": batch_size, "global_batch_size": global_batch_size}
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; allowed: whole numbers from 1")
    if not (math.isfinite(target_tau) and target_tau > 0):
        raise ValueError(f"target_tau is {target_tau!r}; allowed: a finite number above 0, in iterations at S = 1")
