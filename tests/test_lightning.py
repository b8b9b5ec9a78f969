"""AdaScale in Lightning: the example on two DDP processes, and a fit that goes on from its checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.installed import imported

pl: Any = imported("lightning.pytorch")

from stretto.integrations.lightning import AdaScaleCallback  # noqa: E402  (needs Lightning)
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_digits.py"


def test_the_example_learns_the_digits_on_two_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--devices", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    found = re.search(r"accuracy (\S+) after (\d+) steps, tau (\d+), last gain (\S+)", done.stdout)
    assert found, done.stdout + done.stderr
    accuracy, steps, tau, gain = (float(number) for number in found.groups())
    assert accuracy > 0.93
    assert tau >= 800 > steps > 400
    assert 1.0 < gain <= 2.0


class Line(pl.LightningModule):  # type: ignore[misc]  # Lightning may be missing
    """A linear regression."""

    def __init__(self, scheduler: str = "step") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 1)
        self.interval = scheduler

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True) + 1), 4)


def fit(folder: Path, epochs: int, model: Any = None, **options: Any) -> tuple[Any, AdaScaleCallback, Any]:
    callback = AdaScaleCallback(base_batch_size=4)
    checkpoint = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accumulate_grad_batches": 3, **options},
    )
    model = model or Line()
    trainer.fit(model, data(), ckpt_path=checkpoint)
    return trainer, callback, model


@pytest.mark.filterwarnings("ignore")
def test_a_fit_goes_on_from_its_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    _, whole, model = fit(tmp_path, 4)
    trainer, first, _ = fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second, resumed = fit(tmp_path, 4, ckpt_path=tmp_path / "half.ckpt")
    assert first.optimizer.tau < second.optimizer.tau == whole.optimizer.tau
    assert whole.optimizer.gain > 1.0
    assert second.optimizer.effective_lr == whole.optimizer.effective_lr
    assert torch.equal(resumed.layer.weight, model.layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_clipped_and_the_last_batch_may_be_small(tmp_path: Path) -> None:
    _, callback, _ = fit(tmp_path, 1, accumulate_grad_batches=1, gradient_clip_val=0.1)
    assert (callback.optimizer.tau, callback.optimizer.scale) == (12.0, 1.0)


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_in_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write it in steps"):
        fit(tmp_path, 1, Line("epoch"))
