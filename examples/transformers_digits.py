"""AdaScale in Hugging Face's Trainer: a tiny vision transformer, from its configuration, on scikit-learn's digits.

    python examples/transformers_digits.py
    torchrun --nproc-per-node 4 examples/transformers_digits.py --micro-batches 1    # ranks instead of micro-batches

AdamW's rate and schedule are for batches of 16, and 400 steps; with AdamScale they hold for batches of 64 too.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from stretto.integrations.transformers import AdaScaleCallback
from torch.utils.data import Dataset, Subset, random_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

BASE_BATCH_SIZE, TARGET_TAU = 16, 400


class Digits(Dataset[dict[str, torch.Tensor]]):
    """Images of one channel and 8 x 8 pixels."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def make_model() -> Any:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def accuracy_of(model: Any, test: Subset[dict[str, torch.Tensor]]) -> float:
    batch = [test[i] for i in range(len(test))]
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in batch])).logits
    return float((logits.argmax(dim=1) == torch.stack([row["labels"] for row in batch])).float().mean())


def main(micro_batches: int = 4, folder: str = "checkpoints/transformers", **options: Any) -> dict[str, float]:
    """Train; returns accuracy, tau and optimizer steps."""
    set_seed(0)
    train, test = random_split(Digits(), [1297, 500], torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=TARGET_TAU,
        per_device_train_batch_size=BASE_BATCH_SIZE,
        gradient_accumulation_steps=micro_batches,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        dataloader_drop_last=True,
        logging_steps=20,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    model = make_model()
    trainer = Trainer(model=model, args=arguments, train_dataset=train)
    callback = AdaScaleCallback(trainer, base_batch_size=BASE_BATCH_SIZE, rule="adamscale")
    trainer.add_callback(callback)
    trainer.train()
    accuracy, tau = accuracy_of(model, test), callback.optimizer.tau
    if trainer.is_world_process_zero():
        print(f"accuracy {accuracy:.3f} after {trainer.state.global_step} steps, tau {tau:.0f}")
    return {"accuracy": accuracy, "tau": tau, "steps": trainer.state.global_step}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=4)
    main(parser.parse_args().micro_batches)
