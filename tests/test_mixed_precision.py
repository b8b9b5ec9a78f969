"""Autocast and a GradScaler inside ElasticTrainer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stretto.mixed_precision import MixedPrecision
from stretto.trainer_settings import TrainerSettings
from trainer_run import Plan, make_dataset, make_trainer, train, train_on_ranks


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10, **options)


def with_scaler(plan: Plan, grad_scaler: torch.amp.GradScaler) -> Plan:
    return replace(plan, settings={**plan.settings, "mixed_precision": MixedPrecision(grad_scaler=grad_scaler)})


def test_a_scaled_training_is_the_plain_one() -> None:
    plan = Plan(batch_size=2, base_batch_size=2, global_batch_size=8)  # four micro-batches
    plain, parameters = train(plan)
    own = scaler()
    scaled, scaled_parameters = train(with_scaler(plan, own))
    assert [report.gain for report in scaled] == pytest.approx([report.gain for report in plain], rel=1e-6)
    assert max(report.gain for report in plain) > 1.1
    assert scaled_parameters == pytest.approx(parameters, rel=1e-6)
    assert own.get_scale() > 1024


class Spiked(torch.utils.data.TensorDataset):
    """One sample whose loss overflows."""

    def __init__(self) -> None:
        inputs, targets = make_dataset().tensors
        targets[7] = torch.inf
        super().__init__(inputs, targets)


def test_a_step_that_overflows_is_skipped_and_lowers_the_scale() -> None:
    own = scaler()
    trainer = make_trainer(with_scaler(Plan(target_tau=14.0), own), Spiked())
    reports = list(trainer)
    still = [b.step for a, b in itertools.pairwise(reports) if b.tau == a.tau]
    assert len(still) >= 1
    assert own.get_scale() < 1024 * 2
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_the_scalers_state_is_part_of_the_state(tmp_path: Path) -> None:
    plan = Plan(checkpoint=str(tmp_path / "checkpoints"))
    whole, parameters = train(with_scaler(replace(plan, checkpoint=None), scaler()))
    first, _ = train(replace(with_scaler(plan, scaler()), steps=23, save=True))
    own = scaler()
    second, resumed = train(with_scaler(plan, own))
    assert first + second == whole
    assert resumed == parameters
    assert own.get_scale() == 1024.0 * 2 ** (len(whole) // 10)


def test_ranks_scale_alike(tmp_path: Path) -> None:
    plan = Plan(target_tau=10.0, settings={"mixed_precision": MixedPrecision(torch.bfloat16)})
    reports, _ = train_on_ranks(plan, 2, tmp_path)
    assert reports[-1].tau >= 10
    assert max(report.gain for report in reports) > 1.01


@pytest.mark.parametrize(
    ("precision", "message"),
    [(MixedPrecision(torch.float64), "is torch.float64; allowed"), (MixedPrecision(torch.float16), "grad_scaler")],
)
def test_senseless_combinations_are_refused(precision: MixedPrecision, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerSettings(mixed_precision=precision).validate()
