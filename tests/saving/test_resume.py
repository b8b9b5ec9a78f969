"""Saved by some ranks in one way, gone on with by others in another: the losses are those of an undisturbed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from saving.fsdp_ranks import BATCH, make_state, on_processes, step
from trainer_run import Plan, train, train_on_ranks

SAVED_AT = 20
CHECKED = 50


@pytest.mark.parametrize(("rule", "optimizer"), [("adascale", "momentum"), ("adascale", "adam"), ("identity", "adamw")])
def test_the_next_50_losses_at_another_world_size_are_those_of_an_undisturbed_run(
    rule: str, optimizer: str, tmp_path: Path
) -> None:
    """Saved by 2, gone on with by 3, and then by one. At S = 1, where AdaScale's gain is 1 at any number of workers."""
    plan = Plan(
        target_tau=200.0,
        global_batch_size=10,  # every batch is whole: the last of an epoch would have another S
        batch_size=4,
        base_batch_size=10,
        rule=rule,
        optimizer=optimizer,
        lr=0.02,
    )
    undisturbed, _ = train(replace(plan, steps=SAVED_AT + 2 * CHECKED))
    saving = replace(plan, checkpoint=str(tmp_path / "checkpoints"), save=True)
    train_on_ranks(replace(saving, steps=SAVED_AT), 2, tmp_path)
    more, _ = train_on_ranks(replace(saving, steps=CHECKED), 3, tmp_path)
    fewer, _ = train(replace(saving, steps=CHECKED))
    for resumed, expected in zip([*more, *fewer], undisturbed[SAVED_AT:], strict=True):
        assert (resumed.step, resumed.tau, resumed.samples) == (expected.step, expected.tau, expected.samples)
        assert resumed.effective_lr == expected.effective_lr
        assert resumed.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_state_goes_through_fsdp_ddp_and_one_process_at_other_sizes(optimizer: str, tmp_path: Path) -> None:
    """Saved by 3 ranks of FSDP2, gone on with by 4 of HSDP, 2 of DDP, 8 of FSDP2 and one process, 50 steps each."""
    state = make_state("plain", 1, optimizer)
    expected = [step(state, number, 0, 1) for number in range(SAVED_AT + 4 * CHECKED)]
    folder, at = tmp_path / "checkpoints", 0
    for mode, world_size in [("fsdp", 3), ("hsdp", 4), ("ddp", 2), ("fsdp", 8), ("plain", 1)]:
        assert BATCH % world_size == 0
        steps = (at, at + (CHECKED if at else SAVED_AT))
        found = on_processes(mode, world_size, folder, steps, save=True, optimizer=optimizer)
        assert found["resumed"] == at, f"{mode} on {world_size}"
        for number, loss in enumerate(found["losses"], start=at):
            assert loss == pytest.approx(expected[number], rel=1e-5), f"{mode} on {world_size}, step {number}"
        at = steps[1]


@pytest.mark.e2e
def test_shards_are_written_once_also_where_ranks_hold_replicas(tmp_path: Path) -> None:
    plain = on_processes("plain", 1, tmp_path / "plain", (0, 2), save=True)
    sharded = on_processes("hsdp", 4, tmp_path / "hsdp", (0, 2), save=True)
    sizes = [
        sum(file.stat().st_size for file in Path(found["path"]).glob("*.safetensors"))
        - sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in Path(found["path"]).glob("*.safetensors"))
        for found in (plain, sharded)
    ]
    assert sizes[0] == sizes[1] > 0
