"""The same model under ElasticTrainer, which lives on. usage: train_elastic.py JSON-OF-OPTIONS

It also logs when each stage of a change ends: the names below are those of the methods that begin or end it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from stretto import ElasticTrainer
from stretto.feed import Feed
from stretto.group import GroupLife
from stretto.live import Generation, LiveSession
from stretto.step import Stepper
from stretto.trainer_settings import TrainerSettings
from torch.utils.data import TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from outages.models import BATCH, INPUTS, OUTPUTS, make_model
from outages.worker_log import WorkerLog

SAMPLES = 4096

options = json.loads(sys.argv[1])
directory = Path(options["directory"])
torch.set_num_threads(1)
log = WorkerLog()
changing = True  # stages are logged from the beginning of a change until its first step


def log_stages(owner: type, method: str, before: str = "", after: str = "") -> None:
    """Log a stage's end before or after each call of a method, while a change is under way."""
    original = getattr(owner, method)

    def logged(*args: Any, **kwargs: Any) -> Any:
        global changing
        changing = changing or method == "ask"
        if before and changing:
            size_bytes = sum(map(count_bytes, args[1].values())) if method == "synchronise" else 0
            log.stage(before, size_bytes)
        result = original(*args, **kwargs)
        if after and changing:
            log.stage(after)
        return result

    setattr(owner, method, logged)


def count_bytes(part: Any) -> int:
    """Of all tensors in something with a state_dict, or in a state."""
    if isinstance(part, torch.Tensor):
        return part.numel() * part.element_size()
    if hasattr(part, "state_dict"):
        return count_bytes(part.state_dict())
    children = part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ()
    return sum(map(count_bytes, children))


log_stages(LiveSession, "ask", "notice")
log_stages(GroupLife, "build", "assignment", "build")
log_stages(Generation, "synchronise", "enter", "synchronise")
log_stages(Generation, "wrap", "share", "wrap")
log_stages(Generation, "check_equal", "fingerprint", "compare")
log_stages(Feed, "next_step", "begin", "feed")
log_stages(Stepper, "take", after="step")

model = make_model(options["parameters"])
generator = torch.Generator().manual_seed(5)
trainer = ElasticTrainer(
    model,
    torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    TensorDataset(
        torch.randn(SAMPLES, INPUTS, generator=generator), torch.randn(SAMPLES, OUTPUTS, generator=generator)
    ),
    lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]),
    base_batch_size=BATCH,
    batch_size=BATCH,
    target_tau=1e12,
    checkpoint=directory / "checkpoints" if options["checkpoints"] else None,
    settings=TrainerSettings(sample_log=directory / "samples"),
)
asked_s = time.monotonic()
for report in trainer:
    changing = False
    log.step(
        asked_s,
        rank=trainer.rank,
        world_size=report.world_size,
        generation=report.generation,
        step=report.step,
    )
    time.sleep(options["pace_s"])
    asked_s = time.monotonic()
