"""Plain DDP loops in every way that torch offers, each against gradients computed anew in one process.

Each function is run by all ranks of the default group and raises where AdaScale is wrong.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ddp_corners import CORNERS
from ddp_loop import ALONE, SIZE, Loop, ddp
from gain_oracle import GainOracle
from rank_scenarios import batch_of
from stretto import AdaScale
from stretto.adascale_options import AdaScaleSettings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import LR, backward, gradient_of, loss_of, make_model, parameters_of


def plain() -> None:
    Loop().take()


def find_unused_parameters_and_a_parameter_frozen_later() -> None:
    loop = Loop(wrap=ddp(find_unused_parameters=True))
    loop.take(2)
    first = loop.bare.get_submodule("0")
    assert isinstance(first, nn.Linear)
    first.bias.requires_grad_(False)
    loop.take(2)
    first.bias.requires_grad_(True)
    loop.take(2)


def frozen_from_the_start() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    Loop(model=model).take()


def gradients_as_bucket_views() -> None:
    Loop(wrap=ddp(gradient_as_bucket_view=True)).take()
    loop = Loop(wrap=ddp(gradient_as_bucket_view=True))
    loop.take(clear=lambda ada: ada.zero_grad(set_to_none=False))


def a_static_graph() -> None:
    Loop(wrap=ddp(static_graph=True)).take()


def zero_grad_in_both_ways() -> None:
    loop = Loop()
    loop.take()
    loop.take(clear=lambda ada: ada.zero_grad(set_to_none=False))


def clearing_by_the_model_instead() -> None:
    loop = Loop()
    loop.take(clear=lambda ada: loop.bare.zero_grad())


def clipping_after_the_backward() -> None:
    Loop().take(between=lambda loop: float(nn.utils.clip_grad_norm_(loop.bare.parameters(), 1e-2)))


def several_groups_and_one_that_is_added() -> None:
    model = make_model()
    layers = [model[0], model[2]]
    loop = Loop(
        model=model,
        inner=lambda _: torch.optim.SGD([{"params": layers[0].parameters(), "lr": 0.1}], lr=0.1, momentum=0.9),
    )
    loop.ada.add_param_group({"params": list(layers[1].parameters()), "lr": 0.01})
    loop.take()
    assert loop.ada.effective_lr == pytest.approx([0.1 * loop.ada.gain, 0.01 * loop.ada.gain])


def parameters_of_another_optimizer_do_not_count() -> None:
    model = make_model()
    loop = Loop(model=model, inner=lambda _: torch.optim.SGD(model[2].parameters(), lr=LR))
    own = slice(sum(p.numel() for p in model[0].parameters()), None)
    for _ in range(3):
        batches = loop.batches()
        gain = loop.expect([gradient_of(model, batch)[own] for batch in batches])
        model.zero_grad()
        loop.ada.zero_grad()
        backward(loss_of(loop.model, batches[dist.get_rank()]))
        loop.ada.step()
        loop.check(gain)


def a_grad_scaler_with_an_infinity_on_one_rank() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    loop = Loop(dtype=torch.float32, rel=1e-4, grad_scaler=scaler)
    loop.take(3, scaler=scaler)
    state, parameters = str(loop.ada.state_dict()["adascale"]), parameters_of(loop.bare)
    loop.ada.zero_grad()
    x, y = loop.batches()[dist.get_rank()]
    loss = loss_of(loop.model, (x * math.inf if dist.get_rank() == 1 else x, y))
    backward(scaler.scale(loss))
    scaler.step(loop.ada)
    scaler.update()
    assert str(loop.ada.state_dict()["adascale"]) == state
    np.testing.assert_array_equal(parameters_of(loop.bare), parameters)
    loop.step += 1
    loop.take(2, scaler=scaler, between=lambda loop: scaler.unscale_(loop.ada))


def autocast(dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
        loop = Loop(dtype=torch.float32, rel=2e-3, grad_scaler=scaler)
        loop.take(scaler=scaler, context=lambda: torch.autocast("cpu", dtype=dtype))

    return run


def half_precision_gradients(dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        Loop(dtype=dtype, rel=2e-2).take()  # the ranks add up in the same precision

    return run


def optimizer(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[], None]:
    """Any optimizer, its learning rate a tensor that must be the same one, and the same number, afterwards."""

    def run() -> None:
        rate = torch.tensor(0.01, dtype=torch.float64)
        loop = Loop(inner=lambda model: make(model.parameters(), lr=rate, **options))
        seen: list[float] = []
        loop.inner.register_step_pre_hook(lambda *_: seen.append(float(rate)))
        loop.take()
        assert seen[-1] == pytest.approx(0.01 * loop.ada.gain)
        assert loop.inner.param_groups[0]["lr"] is rate
        assert torch.equal(rate, torch.tensor(0.01, dtype=torch.float64))

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        loop.inner.register_step_post_hook(fail)
        tau = loop.ada.tau
        with pytest.raises(RuntimeError, match="out of memory"):
            loop.take_one()
        assert torch.equal(rate, torch.tensor(0.01, dtype=torch.float64))
        assert loop.ada.tau == tau

    return run


def a_closure() -> None:
    loop = Loop()
    for _ in range(3):
        batches = loop.batches()
        gain = loop.expect([gradient_of(loop.bare, batch) for batch in batches])

        def closure(batches: Any = batches) -> Tensor:
            loop.ada.zero_grad()
            loss = loss_of(loop.model, batches[dist.get_rank()])
            backward(loss)
            return loss

        assert loop.ada.step(closure).item() > 0
        loop.check(gain)


def nothing_is_compiled_yet() -> None:
    """What was compiled for models of other variants is checked again, and ends while it is, as garbage is found."""
    gc.collect()
    torch.compiler.reset()


def compiled_outside() -> None:
    nothing_is_compiled_yet()

    def wrap(model: nn.Module) -> nn.Module:
        compiled: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        module: nn.Module = compiled
        return module

    Loop(wrap=wrap).take()


def compiled_inside() -> None:
    nothing_is_compiled_yet()

    def wrap(model: nn.Module) -> nn.Module:
        compiled: Any = torch.compile(model, backend="aot_eager")
        return DistributedDataParallel(compiled)

    Loop(wrap=wrap).take()


def unsynchronised_micro_batches() -> None:
    for view in (False, True):
        loop = Loop(wrap=ddp(gradient_as_bucket_view=view), accumulation_steps=3, settings=AdaScaleSettings())
        wrapped = loop.model
        assert isinstance(wrapped, DistributedDataParallel)
        for _ in range(3):
            loop.ada.zero_grad()
            sums: list[Any] = [0.0] * dist.get_world_size()
            for micro in range(3):
                batches = loop.batches(micro)
                sums = [total + gradient_of(loop.bare, batch) / 3 for total, batch in zip(sums, batches, strict=True)]
                with wrapped.no_sync() if micro < 2 else contextlib.nullcontext():
                    backward(loss_of(wrapped, batches[dist.get_rank()]) / 3)
            loop.oracle.update([3 * SIZE] * len(sums), sums, 3.0 * len(sums))
            loop.tau += loop.oracle.gain(3.0 * len(sums))
            loop.ada.step()
            loop.check(loop.oracle.gain(3.0 * len(sums)))


def orthogonal_contributions_in_two_unsynchronised_micro_batches() -> None:
    """Every sample of every rank and micro-batch has a direction of its own, so the gain is the scale."""
    world = dist.get_world_size()
    model = nn.Linear(2 * world, 2, bias=False)
    wrapped = DistributedDataParallel(model)
    ada = AdaScale(
        torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=1, batch_size=1, accumulation_steps=2
    )
    for micro in range(2):
        with wrapped.no_sync() if micro == 0 else contextlib.nullcontext():
            backward(wrapped(torch.eye(2 * world)[dist.get_rank() + micro * world]).sum() / 2)
    ada.step()
    assert ada.gain == pytest.approx(2.0 * world, rel=1e-6)


class Looked(nn.Module):
    """Rows of a table, whose gradients are sparse, and a layer whose gradients are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 3, sparse=True, dtype=torch.float64)
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.layer(self.table(rows))
        return out


def sparse_gradients() -> None:
    """The ranks read the same row and rows of their own."""
    model = Looked()
    wrapped = DistributedDataParallel(model)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=SIZE)
    oracle, world = GainOracle(), dist.get_world_size()
    for step in range(3):
        batches = [torch.tensor([0, 0, 2 * rank + 1, 2 * rank + 2]) + step for rank in range(world)]
        gradients = []
        for rows in batches:
            twin = copy.deepcopy(model)
            backward(twin(rows).square().mean())
            dense = [p.grad.to_dense() for p in twin.parameters() if p.grad is not None]
            gradients.append(torch.cat([grad.flatten() for grad in dense]).numpy())
        oracle.update([SIZE] * world, gradients, float(world))
        ada.zero_grad()
        backward(wrapped(batches[dist.get_rank()]).square().mean())
        ada.step()
        assert ada.gain == pytest.approx(oracle.gain(float(world)), rel=1e-9)


def adamscale_measures_the_buckets_as_adam_scales_them() -> None:
    """Against one process with a micro-batch for each rank."""
    world = dist.get_world_size()
    adam: Any = torch.optim.Adam
    loop = Loop(inner=lambda m: adam(m.parameters(), lr=0.01), wrap=ddp(bucket_cap_mb=1e-4), rule="adamscale")
    twin_model = make_model()
    wrapped_alone = DistributedDataParallel(twin_model, process_group=ALONE[dist.get_rank()])
    twin = AdaScale(
        adam(twin_model.parameters(), lr=0.01),
        wrapped_alone,
        base_batch_size=SIZE,
        accumulation_steps=world,
        rule="adamscale",
    )
    for step in range(9):
        loop.ada.zero_grad()
        twin.zero_grad()
        batches = loop.batches()
        backward(loss_of(loop.model, batches[dist.get_rank()]))
        for batch in batches:
            backward(loss_of(wrapped_alone, batch) / world)
        loop.ada.step()
        twin.step()
        assert loop.ada.gain == pytest.approx(twin.gain, rel=1e-6), f"step {step}"
        assert (loop.ada.gain > 1) == (step >= 5)
        loop.step += 1


def the_state_goes_on_at_another_world_size() -> None:
    """Saved by all ranks, loaded with weights_only by each alone: the same next gain for the same gradients."""
    loop = Loop()
    loop.take()
    file = io.BytesIO()
    torch.save(loop.ada.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    world = dist.get_world_size()
    batches = loop.batches()
    alone = make_model()
    alone.load_state_dict(loop.bare.state_dict())
    wrapped = DistributedDataParallel(alone, process_group=ALONE[dist.get_rank()])
    resumed = AdaScale(
        torch.optim.SGD(alone.parameters(), lr=LR), wrapped, base_batch_size=SIZE, accumulation_steps=world
    )
    resumed.load_state_dict(saved)
    loop.take_one()
    for batch in batches:
        backward(loss_of(wrapped, batch) / world)
    resumed.step()
    assert resumed.gain == pytest.approx(loop.ada.gain, rel=1e-9)
    assert resumed.tau == pytest.approx(loop.ada.tau, rel=1e-9)
    np.testing.assert_allclose(parameters_of(alone), parameters_of(loop.bare), rtol=1e-9)


def two_ranks_then_one_then_two() -> None:
    """A k of 1 uses what is stored and adds nothing; then it goes on."""
    loop = Loop()
    loop.take(2)
    stored = loop.ada.state_dict()["adascale"]["estimator"]
    alone = DistributedDataParallel(loop.bare, process_group=ALONE[dist.get_rank()])
    for batch_size, scale in ((SIZE, 1.0), (4 * SIZE, 4.0)):
        loop.ada.rebind(alone, batch_size=batch_size)
        loop.ada.zero_grad()
        backward(loss_of(alone, batch_of(50, 0, 0, batch_size)))  # the same on both, so they stay alike
        loop.ada.step()
        gain = loop.oracle.gain(scale)
        loop.tau += gain
        loop.check(gain)
    assert loop.ada.gain > 1
    assert loop.ada.state_dict()["adascale"]["estimator"] == stored
    loop.model = DistributedDataParallel(loop.bare)
    loop.ada.rebind(loop.model, batch_size=SIZE)
    loop.take(2)


VARIANTS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        plain,
        find_unused_parameters_and_a_parameter_frozen_later,
        frozen_from_the_start,
        gradients_as_bucket_views,
        a_static_graph,
        zero_grad_in_both_ways,
        clearing_by_the_model_instead,
        clipping_after_the_backward,
        several_groups_and_one_that_is_added,
        parameters_of_another_optimizer_do_not_count,
        a_grad_scaler_with_an_infinity_on_one_rank,
        a_closure,
        compiled_outside,
        compiled_inside,
        unsynchronised_micro_batches,
        orthogonal_contributions_in_two_unsynchronised_micro_batches,
        sparse_gradients,
        adamscale_measures_the_buckets_as_adam_scales_them,
        the_state_goes_on_at_another_world_size,
        two_ranks_then_one_then_two,
        *CORNERS,
    )
} | {
    "autocast_bf16": autocast(torch.bfloat16),
    "autocast_fp16": autocast(torch.float16),
    "bf16_gradients": half_precision_gradients(torch.bfloat16),
    "fp16_gradients": half_precision_gradients(torch.float16),
    "foreach_sgd": optimizer(torch.optim.SGD, momentum=0.9, foreach=True),
    "fused_sgd": optimizer(torch.optim.SGD, momentum=0.9, fused=True),
    "fused_adam": optimizer(torch.optim.Adam, fused=True),
    "fused_adamw": optimizer(torch.optim.AdamW, fused=True),
    "single_tensor_adam": optimizer(torch.optim.Adam, foreach=False, fused=False),
}


def run_all(rank: int) -> dict[str, Any]:
    """What went wrong in each variant; nothing, if all is well."""
    import traceback

    warnings.simplefilter("ignore")
    ALONE.extend(dist.new_group([other]) for other in range(dist.get_world_size()))
    results: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        try:
            variant()
            results[name] = ""
        except Exception:  # noqa: BLE001  (reported by the test of that name)
            results[name] = traceback.format_exc()
    return results
