"""AdaScale on a GPU: nothing waits inside backward, and capturable and fused optimizers keep their tensor rates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gain_oracle import GainOracle
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import backward, expect_step, loss_of, make_batch, make_model

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise where something waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(ada: AdaScale, model: nn.Module, steps: int, scaler: torch.amp.GradScaler | None = None) -> list[float]:
    """The oracle's gains; a backward that waits raises."""
    oracle, gains = GainOracle(), []
    for step in range(steps):
        batches = [tuple(t.to(DEVICE) for t in make_batch(4, 10 * step + j, torch.float32)) for j in range(2)]
        twin = make_model(dtype=torch.float32)
        twin.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
        on_host = [make_batch(4, 10 * step + j, torch.float32) for j in range(2)]
        gains.append(expect_step(twin, on_host, oracle, base=4)[0])
        ada.zero_grad()
        torch.cuda.synchronize()
        with nothing_waits():
            for batch in batches:
                loss = loss_of(model, batch) / 2  # type: ignore[arg-type]  # a pair
                backward(scaler.scale(loss) if scaler else loss)
        if scaler:
            scaler.step(ada)
            scaler.update()
        else:
            ada.step()
        assert ada.gain == pytest.approx(gains[-1], rel=1e-3)
    return gains


@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}])
def test_a_tensor_rate_on_the_gpu_is_restored_exactly(options: dict[str, Any]) -> None:
    model = make_model(dtype=torch.float32).to(DEVICE)
    rate = torch.tensor(0.01, device=DEVICE)
    inner = torch.optim.Adam(model.parameters(), lr=rate, **options)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2)
    gains = train(ada, model, 4)
    assert gains[-1] > 1.0
    assert inner.param_groups[0]["lr"] is rate
    assert float(rate) == float(torch.tensor(0.01))
    assert ada.effective_lr == pytest.approx([0.01 * ada.gain])


def test_a_grad_scaler_on_the_gpu_is_not_waited_for_in_backward() -> None:
    model = make_model(dtype=torch.float32).to(DEVICE)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, grad_scaler=scaler)
    train(ada, model, 4, scaler)


@pytest.mark.parametrize("capturable", [False, True])
def test_adamscale_does_not_wait_in_backward(capturable: bool) -> None:
    model = make_model(dtype=torch.float32).to(DEVICE)
    inner = torch.optim.Adam(model.parameters(), lr=0.01, capturable=capturable)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, rule="adamscale")
    for step in range(8):
        batches = [tuple(t.to(DEVICE) for t in make_batch(4, 10 * step + j, torch.float32)) for j in range(2)]
        ada.zero_grad()
        torch.cuda.synchronize()
        with nothing_waits():
            for batch in batches:
                backward(loss_of(model, batch) / 2)  # type: ignore[arg-type]  # a pair
        ada.step()
    assert 1.0 < ada.gain <= 2.0


def test_unmeasured_steps_still_see_what_is_not_finite() -> None:
    model = make_model(dtype=torch.float32).to(DEVICE)
    settings = AdaScaleSettings(statistics_interval=4)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, settings=settings)
    for poison in [1.0] * 101 + [torch.inf]:
        ada.zero_grad()
        for j in range(2):
            x, y = (t.to(DEVICE) for t in make_batch(4, j, torch.float32))
            backward(loss_of(model, (x * poison, y)) / 2)
        ada.step()
    assert ada.skipped_steps == 1


@pytest.mark.gpus
def test_ddp_over_nccl_has_the_gain_of_one_process() -> None:
    """Run by torchrun on each of several GPUs: `torchrun --nproc-per-node 3 -m pytest -m gpus ...`."""
    if not dist.is_torchelastic_launched():
        pytest.skip("starts under torchrun only")
    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    model = make_model(dtype=torch.float32).to(device)
    wrapped = DistributedDataParallel(model, device_ids=[rank])
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=0.05), wrapped, base_batch_size=4)
    oracle = GainOracle()
    for step in range(4):
        twin = make_model(dtype=torch.float32)
        twin.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
        drawn = [make_batch(4, 10 * step + j, torch.float32) for j in range(world)]
        gain, _ = expect_step(twin, drawn, oracle, base=4)
        ada.zero_grad()
        x, y = (t.to(device) for t in drawn[rank])
        torch.cuda.synchronize()
        with nothing_waits():
            backward(loss_of(wrapped, (x, y)))
        ada.step()
        assert ada.gain == pytest.approx(gain, rel=1e-3)
    dist.destroy_process_group()
