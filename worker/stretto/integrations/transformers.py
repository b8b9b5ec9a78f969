"""AdaScale as a callback of Hugging Face's Trainer, and around any optimizer that Accelerate has prepared."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer, patch_optimizer_step
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from stretto.adascale import AdaScale
from stretto.adascale_options import AdaScaleSettings, whole
from stretto.rules import Rule


class AdaScaleCallback(TrainerCallback, ExportableState):
    """Puts AdaScale around the Trainer's optimizer: `trainer.add_callback(AdaScaleCallback(trainer, ...))`.

    `base_batch_size`: what learning rate and scheduler were written for; set `max_steps` to the steps that they were
    written for, too. Training ends when tau gets there (`target_tau`, default `max_steps`), which takes fewer steps.
    The Trainer's own scheduler is stepped by tau. Checkpoints hold tau and the averages; a Trainer that goes on from
    one has to have the callback before `train`. `optimizer` is the AdaScale, from the beginning of `train`.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        base_batch_size: int,
        target_tau: float | None = None,
        rule: str | Rule = "adascale",
        settings: AdaScaleSettings | None = None,
    ) -> None:
        self._trainer: Any = trainer  # whose attributes are typed as what they are before training
        self._base_batch_size = whole("base_batch_size", base_batch_size)
        self._target_tau = target_tau
        self._rule = rule
        self._settings = settings
        self._optimizer: AdaScale | None = None

    @property
    def optimizer(self) -> AdaScale:
        """The AdaScale of the training that is under way, or was last."""
        if self._optimizer is None:
            raise RuntimeError("AdaScaleCallback has no optimizer before trainer.train() has begun")
        return self._optimizer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the optimizer's and the scheduler's place, with a checkpoint's state if training goes on from one."""
        trainer = self._trainer
        if self._target_tau is None:
            if args.max_steps <= 0:
                raise ValueError(
                    f"max_steps is {args.max_steps}, so the schedule's length depends on the number of ranks: set "
                    "max_steps in TrainingArguments to the steps that it was written for, at the base batch size"
                )
            self._target_tau = float(args.max_steps)
        scheduler = trainer.lr_scheduler
        if isinstance(scheduler, _SteppedByTau):
            scheduler = scheduler.scheduler
        self._optimizer = around_accelerated(
            trainer.optimizer,
            trainer.model_wrapped,
            base_batch_size=self._base_batch_size,
            batch_size=args.per_device_train_batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            scheduler=scheduler,
            rule=self._rule,
            settings=self._settings,
        )
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__)
        if state.global_step and saved:
            # The Trainer has loaded its scheduler already, and the optimizer under AdaScale.
            own = {**saved["attributes"]["adascale"], "scheduler": scheduler.state_dict()}
            self._optimizer.load_state_dict({**self._optimizer.optimizer.state_dict(), "adascale": own})
        trainer.lr_scheduler = _SteppedByTau(scheduler)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave an epoch's short last window out of the averages: the Trainer divides its losses differently."""
        if self._trainer.current_gradient_accumulation_steps != args.gradient_accumulation_steps:
            self.optimizer.ignore_statistics()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop at the target."""
        if self._target_tau is not None and self.optimizer.tau >= self._target_tau:
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of the model's hooks."""
        self.optimizer.unbind()

    def state(self) -> dict[str, Any]:
        """What checkpoints keep, as JSON: tau and the averages."""
        if self._optimizer is None:
            return {"args": {}, "attributes": {}}
        own = {**self._optimizer.state_dict()["adascale"], "scheduler": None}
        return {"args": {}, "attributes": {"adascale": own}}


def around_accelerated(optimizer: AcceleratedOptimizer, model: torch.nn.Module, **options: Any) -> AdaScale:
    """Put AdaScale inside an optimizer that `accelerator.prepare` returned, with the model that it returned.

    Loops go on using `optimizer`; `options` are AdaScale's. A `scheduler` is stepped by tau, no longer by the loop.
    """
    inner = optimizer.optimizer
    if isinstance(inner, AdaScale):  # trained with before
        inner.unbind()
        inner = inner.optimizer
    adascale = AdaScale(inner, model, grad_scaler=optimizer.scaler, **options)
    optimizer.optimizer = adascale
    if optimizer.scaler is not None:  # it learns from its own step() whether the scaler skipped it
        optimizer._optimizer_original_step_method = adascale.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, adascale.step)
    return adascale


class _SteppedByTau:
    """A scheduler that the Trainer reads and saves, and does not step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self, *_: Any) -> None:
        """Nothing: AdaScale has."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)
