"""AdaScale over FSDP2 and HSDP on gloo ranks: the gain is DDP's, and the same on every rank."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_scenarios import in_ranks
from sharded_runs import Blocks, Run, Sizes, take_run, wrap
from stretto import AdaScale
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from toy_regression import backward, make_batch

WORLD = 4
EQUAL: Sizes = ((4,),) * WORLD
PAIRS: Sizes = ((4, 4),) * WORLD

RUNS = {
    "equal": Run((EQUAL,) * 5),
    "float64": Run((EQUAL,) * 3, dtype=torch.float64),
    "unequal_with_total": Run((((32,), (8,), (5,), (1,)), EQUAL), announce="total"),
    "unequal_without_total": Run((((32,), (8,), (5,), (1,)), EQUAL), announce="count"),
    "an_empty_rank": Run((((4,), (0,), (4,), (2,)), EQUAL), announce="total"),
    "accumulated": Run((PAIRS,) * 3, accumulation=2),
    "short_window": Run((((4, 4, 4),) * WORLD, PAIRS), accumulation=3),
    "accumulated_unequal": Run((((4, 4), (2, 7), (0, 3), (1, 0)),) * 2, accumulation=2, announce="total"),
    "summed_losses": Run((PAIRS,) * 2, accumulation=2, settings={"accumulated_loss": "sum"}),
    "scaled": Run((EQUAL,) * 4, scaler=True),
    "scaled_and_poisoned": Run((EQUAL,) * 4, scaler=True, poisoned=2),
    "poisoned": Run((EQUAL,) * 4, poisoned=2),
    "clipped": Run((EQUAL,) * 3, clip=True),
    "frozen": Run((EQUAL,) * 3, frozen=True),
}
ALSO_EACH = {"synchronised_each_time": Run((PAIRS,) * 3, accumulation=2, sync="each")}
KINDS = ("fsdp", "hsdp")
HALF = {
    f"reduced_in_{str(dtype)[6:]}": Run((EQUAL,) * 3, reduce_dtype=dtype) for dtype in (torch.bfloat16, torch.float16)
}


def refused(rank: int) -> list[str]:
    """What AdaScale says to models that it cannot follow."""
    messages = []

    def attempt(build: Any) -> None:
        with pytest.raises(ValueError) as error:
            build()
        messages.append(str(error.value))

    def of(model: nn.Module, **options: Any) -> AdaScale:
        optimizer = options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.1)
        return AdaScale(optimizer, model, base_batch_size=4, **options)

    parts = Blocks(torch.float32)
    fully_shard(parts.first)
    attempt(lambda: of(parts))
    attempt(lambda: of(wrap("fsdp", Blocks(torch.float32), Run(())), rule="adamscale", optimizer=torch.optim.AdamW))
    attempt(lambda: of(wrap("fsdp", Blocks(torch.float32), Run(())), comm_hook=lambda state, bucket: None))
    sharded = wrap("fsdp", Blocks(torch.float32), Run(()))
    some = torch.optim.SGD(list(sharded.parameters())[:1], lr=0.1)
    attempt(lambda: AdaScale(some, sharded, base_batch_size=4))
    ada = of(wrap("hsdp", Blocks(torch.float32), Run(())), accumulation_steps=2)
    model = ada._model()
    assert model is not None
    for micro in range(2):
        x, y = make_batch(4, micro, torch.float32)
        backward(nn.functional.mse_loss(model(x), y) / 2)
    attempt(ada.step)
    return messages


def released(rank: int) -> dict[str, Any]:
    """A model that AdaScale let go of averages over the ranks by itself again."""
    model = wrap("fsdp", Blocks(torch.float32), Run(()))
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=0.1), model, base_batch_size=4)
    norms = []
    for bound in (True, False, True):
        if bound:
            ada.rebind(model)
        else:
            ada.unbind()
        model.zero_grad()
        x, y = make_batch(4, rank, torch.float32)
        backward(nn.functional.mse_loss(model(x), y))
        total: Any = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms.append(float(total.full_tensor()))
    return {"norms": norms}


def work_of_four_ranks(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, run in RUNS.items():
        for kind in ("ddp", *KINDS):
            results[f"{name} {kind}"] = take_run(kind, run, rank)
    for name, run in ALSO_EACH.items():
        for kind in ("ddp", "fsdp"):
            results[f"{name} {kind}"] = take_run(kind, run, rank)
    for name, run in HALF.items():
        for kind in ("ddp", *KINDS):
            results[f"{name} {kind}"] = take_run(kind, run, rank)
    results["refused"] = refused(rank)
    results["released"] = released(rank)
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    spawn(in_ranks, (WORLD, str(folder), work_of_four_ranks), nprocs=WORLD)  # type: ignore[no-untyped-call]  # torch's
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD)]


CASES = [(name, kind) for name in RUNS for kind in KINDS] + [(name, "fsdp") for name in ALSO_EACH]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_gain_of_sharded_models_is_ddps(name: str, kind: str, four_ranks: list[dict[str, Any]]) -> None:
    expected, got = four_ranks[0][f"{name} ddp"], four_ranks[0][f"{name} {kind}"]
    assert max(expected["gains"]) > 1.01
    assert got["gains"] == pytest.approx(expected["gains"], rel=1e-5)
    assert got["taus"] == pytest.approx(expected["taus"], rel=1e-5)
    assert got["skipped"] == expected["skipped"]
    np.testing.assert_allclose(got["statistics"], expected["statistics"], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(got["parameters"], expected["parameters"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_may_be_reduced_in_half_precision(name: str, kind: str, four_ranks: list[dict[str, Any]]) -> None:
    expected, got = four_ranks[0][f"{name} ddp"], four_ranks[0][f"{name} {kind}"]
    assert got["gains"] == pytest.approx(expected["gains"], rel=0.02)
    np.testing.assert_allclose(got["statistics"], expected["statistics"], rtol=0.05)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_rank_of_a_sharded_model_has_the_same_bits(
    name: str, kind: str, four_ranks: list[dict[str, Any]]
) -> None:
    first = four_ranks[0][f"{name} {kind}"]
    for results in four_ranks[1:]:
        other = results[f"{name} {kind}"]
        assert (other["gains"], other["taus"], other["statistics"]) == (
            first["gains"],
            first["taus"],
            first["statistics"],
        )


def test_sharded_models_that_cannot_be_followed_are_refused(four_ranks: list[dict[str, Any]]) -> None:
    expected = ["only parts", "adamscale", "comm_hook", "every parameter", "set_requires_gradient_sync"]
    for results in four_ranks:
        assert [bool(re.search(e, m)) for e, m in zip(expected, results["refused"], strict=True)] == [True] * 5


def test_a_sharded_model_that_is_let_go_averages_by_itself(four_ranks: list[dict[str, Any]]) -> None:
    bound, free, again = four_ranks[0]["released"]["norms"]
    assert bound == pytest.approx(free, rel=1e-6)
    assert again == pytest.approx(free, rel=1e-6)
