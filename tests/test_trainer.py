"""ElasticTrainer on one process and on gloo ranks; no controller."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stretto.checkpoint import Checkpointer
from stretto.errors import Fatal
from stretto.feed import Share, plan_steps, to_device
from stretto.sample_log import LoggedStep, effective_steps
from stretto.sampler import ElasticSampler
from torch.utils.data import Dataset, IterableDataset
from trainer_run import SAMPLES, Plan, make_trainer, train, train_on_ranks


def _assert_exactly_once(steps: list[LoggedStep]) -> None:
    """Steps are numbered without gaps, and every finished epoch used every sample once."""
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    last = steps[-1].epoch
    for epoch in range(last + 1):
        used = [index for step in steps if step.epoch == epoch for index in step.indices]
        assert len(used) == len(set(used)), f"a sample was used twice in epoch {epoch}"
        assert len(used) == SAMPLES or epoch == last, f"epoch {epoch} used {len(used)} of {SAMPLES} samples"
    assert last >= 2, "the run is too short to prove anything"


def _log(path: Path) -> list[LoggedStep]:
    return effective_steps(path.read_text().splitlines())


def test_one_process_trains_to_the_target_and_reports_every_step() -> None:
    reports, _ = train(Plan(target_tau=60.0))
    assert [report.step for report in reports] == list(range(1, len(reports) + 1))
    assert reports[-1].tau >= 60.0 > reports[-2].tau
    assert reports[-1].loss < reports[0].loss
    assert reports[0].samples == 4
    assert reports[0].effective_lr == (0.05,)
    assert {report.world_size for report in reports} == {1}


def test_goes_on_from_the_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    plan = Plan(dropout=0.3, checkpoint=str(tmp_path / "checkpoints"))
    whole, parameters = train(replace(plan, checkpoint=None))
    first, _ = train(replace(plan, steps=17, save=True))
    second, resumed = train(plan)
    assert first + second == whole
    assert resumed == parameters


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path: Path) -> None:
    plan = Plan(checkpoint=str(tmp_path / "checkpoints"), settings={"checkpoint_interval_steps": 5})
    whole, _ = train(replace(plan, checkpoint=None))
    train(replace(plan, steps=18))
    again, _ = train(plan)
    assert 18 - 5 <= len(whole) - len(again) <= 18, "at most one interval is done again"
    assert again == whole[len(whole) - len(again) :]


def test_a_finished_training_has_nothing_left_to_do(tmp_path: Path) -> None:
    plan = Plan(checkpoint=str(tmp_path / "checkpoints"))
    reports, parameters = train(plan)
    assert train(plan) == ([], parameters)
    assert reports[-1].tau >= plan.target_tau


def test_a_finished_training_has_nothing_left_to_do_on_any_number_of_ranks(tmp_path: Path) -> None:
    plan = Plan(checkpoint=str(tmp_path / "checkpoints"), target_tau=8.0)
    _, parameters = train_on_ranks(plan, 2, tmp_path)
    assert train_on_ranks(plan, 3, tmp_path) == ([], parameters)


def test_a_trainer_is_iterated_once() -> None:
    trainer = make_trainer(Plan(target_tau=3.0))
    assert len(list(trainer)) == 3
    with pytest.raises(RuntimeError, match="make a new one"):
        list(trainer)


def test_a_training_that_has_diverged_ends_with_an_error() -> None:
    with pytest.raises(Fatal, match="not finite in 7 steps in a row"):
        train(Plan(lr=1e200, target_tau=1e6, settings={"max_skipped_steps": 7}))


def test_every_sample_is_used_once_per_epoch_while_the_world_size_changes(tmp_path: Path) -> None:
    plan = Plan(
        target_tau=90.0,
        checkpoint=str(tmp_path / "checkpoints"),
        settings={"sample_log": str(tmp_path / "samples.jsonl"), "checkpoint_interval_steps": 4},
    )
    train(replace(plan, steps=8, save=True))
    train_on_ranks(replace(plan, steps=9), 2, tmp_path)
    train_on_ranks(replace(plan, steps=6, save=True), 3, tmp_path)
    train(plan)
    steps = _log(tmp_path / "samples.jsonl")
    _assert_exactly_once(steps)
    sizes = {len(step.indices) for step in steps}
    assert {4, 8, 12} < sizes, "full batches of 1, 2 and 3 workers, and a short one at an epoch's end"
    lines = (tmp_path / "samples.jsonl").read_text().count('"step"')
    assert lines > len(steps), "the break without a checkpoint took steps back, and the log shows it"


def test_with_a_fixed_global_batch_the_loss_curve_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    # identity: with AdaScale the gain is estimated from other contributions at each world size.
    plan = Plan(target_tau=30.0, global_batch_size=12, batch_size=5, base_batch_size=12, rule="identity")
    alone, parameters = train(plan)
    for world_size in (2, 3):
        reports, theirs = train_on_ranks(plan, world_size, tmp_path)
        for ours, other in zip(alone, reports, strict=True):
            assert other.loss == pytest.approx(ours.loss, rel=1e-10), f"step {ours.step} on {world_size} ranks"
            assert other.scale == ours.scale
        assert theirs == pytest.approx(parameters, rel=1e-9)


def test_the_scale_follows_the_workers_and_tau_advances_by_the_gain(tmp_path: Path) -> None:
    reports, _ = train_on_ranks(Plan(target_tau=25.0), 2, tmp_path)
    full = [report for report in reports if report.scale == 2.0]
    assert len(full) > len(reports) / 2
    assert all(min(r.scale, 1.0) <= r.gain <= max(r.scale, 1.0) for r in reports)
    for before, after in itertools.pairwise(reports):
        assert after.tau - before.tau == pytest.approx(after.gain)


class _Augmented(Dataset[Any]):
    """Samples with noise from every source of random numbers that an augmentation may use."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Any:
        import random

        import numpy as np

        inputs, target = self._inner[index]
        return inputs + 0.1 * torch.randn(6) + random.random() + np.random.rand(), target


def test_augmentation_is_the_same_in_loader_children_as_in_this_process() -> None:
    from trainer_run import make_dataset

    plan = Plan(target_tau=20.0)
    here, _ = train(plan, _Augmented(make_dataset()))
    children, _ = train(replace(plan, settings={"dataloader": {"num_workers": 2}}), _Augmented(make_dataset()))
    assert children == here


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(6)


def test_refuses_a_dataset_without_indices() -> None:
    with pytest.raises(ValueError, match=r"IterableDataset.*map-style"):
        make_trainer(Plan(), _Stream())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(base_batch_size=0), "base_batch_size is 0"),
        (Plan(batch_size=-1), "batch_size is -1"),
        (Plan(global_batch_size=0), "global_batch_size is 0"),
        (Plan(target_tau=float("nan")), "target_tau is nan"),
        (Plan(rule="linera"), "rule is 'linera'"),
        (Plan(settings={"dataloader": {"shuffle": True}}), "dataloader has shuffle"),
        (Plan(settings={"max_skipped_steps": 0}), "max_skipped_steps is 0"),
    ],
)
def test_bad_arguments_are_named(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(plan)


def test_refuses_a_checkpoint_that_was_written_for_another_base_batch(tmp_path: Path) -> None:
    plan = Plan(checkpoint=str(tmp_path))
    train(replace(plan, steps=3, save=True))
    with pytest.raises(ValueError, match=r"base_batch_size is 8.*written with 4"):
        make_trainer(replace(plan, base_batch_size=8))


def test_takes_a_checkpointer_that_the_caller_made(tmp_path: Path) -> None:
    checkpointer: Any = Checkpointer(tmp_path, keep=1)
    train(Plan(checkpoint=checkpointer, target_tau=9.0, settings={"checkpoint_interval_steps": 2}))
    assert len(list(tmp_path.glob("generation-*"))) == 1


def test_shares_are_cut_so_that_every_rank_does_as_many_micro_batches() -> None:
    for world_size, size, batch_size in itertools.product((1, 2, 3, 5), (1, 4, 7, 12), (1, 2, 5)):
        sampler = ElasticSampler(20, seed=1)
        shares = [Share(rank, world_size, size, batch_size) for rank in range(world_size)]
        plans = [list(itertools.islice(plan_steps(sampler, share), 30)) for share in shares]
        for ranks in zip(*plans, strict=True):
            parts = [part for plan in ranks for part in plan.micro_batches]
            assert len({len(plan.micro_batches) for plan in ranks}) == 1
            assert all(part.samples <= batch_size and part.keys for part in parts)
            used = [index for part in parts if part.samples for _, index in part.keys]
            assert sorted(used) == sorted(ranks[0].indices)
            assert sum(part.samples for part in parts) == len(ranks[0].indices)


def test_moves_every_tensor_of_a_nested_batch() -> None:
    batch = {"image": torch.zeros(1), "rest": [(torch.ones(1), "name")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["image"].device.type == "meta"
    assert moved["rest"][0][0].device.type == "meta"
    assert moved["rest"][0][1] == "name"
