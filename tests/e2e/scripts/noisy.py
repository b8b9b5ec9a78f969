"""An ElasticTrainer whose gradient has as much noise as a file says. usage: noisy.py DIRECTORY

DIRECTORY/noise holds the gradient's variance at the base batch size over its squared norm. A step waits for 50 ms, as
one on an accelerator would: so more workers really do more, on any machine.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stretto import ElasticTrainer
from stretto.adascale_options import AdaScaleSettings
from stretto.trainer_settings import TrainerSettings
from torch.utils.data import TensorDataset

STEP_S, WIDTH, BATCH_SIZE = 0.05, 64, 4
directory = Path(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s: %(message)s")
torch.set_num_threads(1)


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(WIDTH))

    def forward(self, directions: torch.Tensor) -> torch.Tensor:
        return directions @ self.weights


def loss_fn(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Its gradient is (1, 0, 0, ...) and the mean of the batch's directions, times what the noise asks for."""
    time.sleep(STEP_S)
    noise = float((directory / "noise").read_text())
    signal = torch.zeros(WIDTH)
    signal[0] = 1.0
    loss: torch.Tensor = model(signal + batch[0] * (noise * BATCH_SIZE / WIDTH) ** 0.5).mean()
    return loss


model = Weights()
trainer = ElasticTrainer(
    model,
    torch.optim.SGD(model.parameters(), lr=1e-9),
    TensorDataset(torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(1))),
    loss_fn,
    base_batch_size=BATCH_SIZE,
    batch_size=BATCH_SIZE,
    target_tau=1e6,
    checkpoint=directory / "checkpoints",
    settings=TrainerSettings(checkpoint_interval_s=None, adascale=AdaScaleSettings(smoothing=0.98)),
)
for _ in trainer:
    pass
