"""AdaScale as a Lightning callback: the module's own optimizer and scheduler, at the right rate for the scale."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch.optim.lr_scheduler import LRScheduler

from stretto.adascale import AdaScale
from stretto.adascale_options import AdaScaleSettings, whole
from stretto.rules import Rule


class AdaScaleCallback(Callback):
    """Puts AdaScale around the optimizer that `configure_optimizers` made, and lets tau step its scheduler.

    `base_batch_size`: what learning rate and scheduler were written for. `batch_size`: samples per device and batch
    (default: the base batch size). `target_tau`: stop there, in steps at the base batch size; None: Trainer's limits
    alone. A scheduler has to be written in steps (`"interval": "step"`). Checkpoints hold tau and the averages.
    With `accumulate_grad_batches` above 1 use loaders that drop the last, incomplete batch. Logs `gain` and `tau`.
    """

    def __init__(
        self,
        *,
        base_batch_size: int,
        batch_size: int | None = None,
        target_tau: float | None = None,
        rule: str | Rule = "adascale",
        settings: AdaScaleSettings | None = None,
    ) -> None:
        self._base_batch_size = whole("base_batch_size", base_batch_size)
        self._batch_size = batch_size
        self._target_tau = target_tau
        self._rule = rule
        self._settings = settings
        self._optimizer: AdaScale | None = None

    @property
    def optimizer(self) -> AdaScale:
        """The AdaScale of the fit that is under way, or was last."""
        if self._optimizer is None:
            raise RuntimeError("AdaScaleCallback has no optimizer before trainer.fit(...) has begun")
        return self._optimizer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the optimizer's place; its saved state, if any, is loaded after this."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError(
                f"AdaScaleCallback needs automatic optimization with one optimizer, and the module has "
                f"{len(trainer.optimizers)}; with several, put stretto.AdaScale around each in a loop of your own"
            )
        strategy: Any = trainer.strategy
        self._optimizer = AdaScale(
            trainer.optimizers[0],
            strategy.model,
            base_batch_size=self._base_batch_size,
            batch_size=self._batch_size,
            accumulation_steps=trainer.accumulate_grad_batches,
            scheduler=self._take_scheduler(trainer),
            rule=self._rule,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            settings=self._settings,
        )
        strategy.optimizers = [self._optimizer]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say the size of an incomplete batch; Lightning's samplers give every rank as many."""
        if trainer.accumulate_grad_batches == 1:
            samples = extract_batch_size(batch)
            self.optimizer.set_num_samples(samples, total=samples * self.optimizer.world_size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and stop at the target."""
        pl_module.log_dict({"gain": self.optimizer.gain, "tau": self.optimizer.tau})
        if self._target_tau is not None and self.optimizer.tau >= self._target_tau:
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model's hooks."""
        if self._optimizer is not None:
            self._optimizer.unbind()

    @staticmethod
    def _take_scheduler(trainer: Trainer) -> LRScheduler | None:
        """The module's scheduler, which Lightning steps no more."""
        configs = trainer.lr_scheduler_configs
        if not configs:
            return None
        (config,) = configs
        if config.interval != "step" or config.frequency != 1:
            raise ValueError(
                f"the scheduler is stepped every {config.frequency} {config.interval}(s), and AdaScale reads schedules "
                'in steps at the base batch size: write it in steps, and return {"scheduler": scheduler, "interval": '
                '"step"} from configure_optimizers'
            )
        scheduler: Any = config.scheduler
        trainer.strategy.lr_scheduler_configs = []
        if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            raise ValueError(
                f"the scheduler is a {type(scheduler).__name__}; allowed: a torch LRScheduler that follows steps"
            )
        return scheduler
