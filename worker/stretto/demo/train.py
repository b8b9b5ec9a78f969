"""The training script that the demonstration's agents run: `torchrun ... train.py --checkpoint DIR --result FILE`.

Also a small example of a script for ElasticTrainer. With --reference it trains on one worker, without the package.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

from stretto.demo import workload
from stretto.trainer import ElasticTrainer
from stretto.trainer_settings import TrainerSettings


def train(checkpoint: Path, result: Path, *, images: Path | None, pace: Path | None, sample_log: Path | None) -> None:
    """Train until target tau; rank 0 then writes the test accuracy to `result`."""
    training, test = workload.load_images(images)
    model = workload.make_model()
    optimizer, scheduler = workload.make_optimizer(model)
    trainer = ElasticTrainer(
        model,
        optimizer,
        training,
        workload.loss_fn,
        base_batch_size=workload.BASE_BATCH_SIZE,
        batch_size=workload.BASE_BATCH_SIZE,
        target_tau=workload.TARGET_TAU,
        scheduler=scheduler,
        checkpoint=checkpoint,
        settings=TrainerSettings(seed=workload.SEED, checkpoint_interval_s=2.0, sample_log=sample_log),
    )
    started_s = time.monotonic()
    for _ in trainer:
        # A person should be able to follow the story: a real model would take its time by itself.
        step_s = float(pace.read_text()) if pace is not None and pace.exists() else 0.0
        time.sleep(max(0.0, started_s + step_s - time.monotonic()))
        started_s = time.monotonic()
    if trainer.rank == 0:
        write_result(result, workload.accuracy(trainer.model, test))


def write_result(path: Path, accuracy: float) -> None:
    """Put the accuracy where the story looks for it, at once or not at all."""
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(json.dumps({"accuracy": accuracy}))
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="where the test accuracy goes, as JSON")
    parser.add_argument("--images", type=Path, help="what --prepare-images wrote; saves seconds at each start")
    parser.add_argument("--prepare-images", action="store_true", help="write the images to --images, and end")
    parser.add_argument("--reference", action="store_true", help="one worker, plain SGD, the same schedule")
    parser.add_argument("--checkpoint", type=Path, help="directory of the checkpoints")
    parser.add_argument("--pace", type=Path, help="a file with the seconds that a step takes at least")
    parser.add_argument("--sample-log", type=Path, help="gets the sample indices of each step, as JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.prepare_images:
        workload.unpack_images(arguments.images)
    elif arguments.result is None:
        parser.error("--result is missing")
    elif arguments.reference:
        write_result(arguments.result, workload.train_reference(arguments.images))
    elif arguments.checkpoint is None:
        parser.error("--checkpoint is missing")
    else:
        train(
            arguments.checkpoint,
            arguments.result,
            images=arguments.images,
            pace=arguments.pace,
            sample_log=arguments.sample_log,
        )


if __name__ == "__main__":
    main()
