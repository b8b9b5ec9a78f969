"""AdaScale in Lightning: a small MLP on scikit-learn's digits, at four times the batch its schedule was written for.

python examples/lightning_digits.py
python examples/lightning_digits.py --devices 4      # four processes with DDP instead of four micro-batches
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from stretto.integrations.lightning import AdaScaleCallback
from torch.utils.data import DataLoader, TensorDataset

BASE_BATCH_SIZE, TARGET_TAU = 16, 800


class Digits(pl.LightningModule):
    """Nothing in it knows of AdaScale: its rate and schedule are for batches of 16, and 800 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(dim=1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TARGET_TAU)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(devices: int = 1, folder: str = "checkpoints/lightning") -> dict[str, float]:
    """Train; returns accuracy, tau and optimizer steps."""
    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [1297, 500], torch.Generator().manual_seed(0))
    callback = AdaScaleCallback(base_batch_size=BASE_BATCH_SIZE, target_tau=TARGET_TAU)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=1 if devices > 1 else 4,
        max_epochs=1000,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(train, BASE_BATCH_SIZE, shuffle=True, drop_last=True))
    trainer.validate(model, DataLoader(test, 500), verbose=False)
    accuracy = float(trainer.callback_metrics["accuracy"])
    tau, steps = callback.optimizer.tau, trainer.global_step
    if trainer.is_global_zero:
        print(f"accuracy {accuracy:.3f} after {steps} steps, tau {tau:.0f}, last gain {callback.optimizer.gain:.2f}")
    return {"accuracy": accuracy, "tau": tau, "steps": steps}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    main(parser.parse_args().devices)
