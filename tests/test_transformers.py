"""AdaScale in Hugging Face's Trainer: the example on two ranks, and a training that goes on from its checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.installed import imported

transformers: Any = imported("transformers")
imported("accelerate")

from stretto.integrations.transformers import AdaScaleCallback, around_accelerated  # noqa: E402  (needs both)

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_digits.py"


def test_the_example_learns_the_digits_on_two_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(EXAMPLE), "--micro-batches", "2"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    found = re.search(r"accuracy (\S+) after (\d+) steps, tau (\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    accuracy, steps, tau = (float(number) for number in found.groups())
    assert accuracy > 0.6
    assert tau >= 400 > steps >= 100


class Line(torch.nn.Module):
    """A linear regression that returns its loss as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.layer(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(56, 6, generator=generator)
    return [{"x": x, "labels": x.sum(dim=0, keepdim=True) + 1} for x in inputs]


def train(folder: Path, *, resume: str | None = None, **options: Any) -> tuple[AdaScaleCallback, Line, Any]:
    model = Line()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=30,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        learning_rate=0.02,
        lr_scheduler_type="cosine",
        optim="sgd",
        save_steps=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows())
    callback = AdaScaleCallback(trainer, base_batch_size=4)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return callback, model, trainer


@pytest.mark.filterwarnings("ignore")
def test_a_training_goes_on_from_its_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, model, trainer = train(tmp_path / "whole")
    assert whole.optimizer.gain > 1.0
    assert whole.optimizer.tau >= 30 > trainer.state.global_step
    resumed, same, again = train(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-10"))
    assert again.state.global_step == trainer.state.global_step
    assert resumed.optimizer.tau == pytest.approx(whole.optimizer.tau, rel=1e-6)
    assert resumed.optimizer.effective_lr == pytest.approx(whole.optimizer.effective_lr, rel=1e-5)
    torch.testing.assert_close(same.layer.weight, model.layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_of_unknown_length_is_refused(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = transformers.Trainer(model=Line(), args=arguments, train_dataset=rows())
    trainer.add_callback(AdaScaleCallback(trainer, base_batch_size=4))
    with pytest.raises(ValueError, match="set max_steps"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_a_loop_with_accelerate_alone() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Line()
    inner = torch.optim.SGD(model.parameters(), lr=0.02)
    model, optimizer = accelerator.prepare(model, inner)
    adascale = around_accelerated(optimizer, model, base_batch_size=4, accumulation_steps=2)
    batch = rows()
    for start in range(0, 48, 4):
        part = batch[start : start + 4]
        with accelerator.accumulate(model):
            stacked = {name: torch.stack([row[name] for row in part]) for name in ("x", "labels")}
            accelerator.backward(model(**stacked)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert 6.0 < adascale.tau < 12.0
    assert adascale.scale == 2.0
