"""Adasum over gloo between processes: collectives, DDP's buckets, delta mode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adasum_scenarios import DDP, LR, OPTIMIZERS, flat, work
from rank_scenarios import batch_of, in_ranks
from stretto import adasum
from torch.multiprocessing.spawn import spawn
from toy_regression import backward, loss_of, make_model

# Five ranks do all their work in a fixture, on however many cores.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", params=[2, 3, 4, 5])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(in_ranks, (request.param, str(folder), work), nprocs=request.param)  # type: ignore[no-untyped-call]  # torch's
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_collectives_give_the_reference_and_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for name, (found, wanted) in ranks[0]["collectives"].items():
        coarse = "float16" in name
        for mine, right in zip(found, wanted, strict=True):
            size = float(right.double().norm())
            assert float((mine.double() - right.double()).norm()) <= (0.05 if coarse else 1e-6) * size, name
        for other in ranks[1:]:
            theirs = other["collectives"][name][0]
            assert all(torch.equal(mine, their) for mine, their in zip(found, theirs, strict=True)), name


@pytest.mark.parametrize("case", [*DDP, "clipped", "nodes"])
def test_ddp_steps_along_the_adasum_of_all_gradients(case: str, ranks: list[dict[str, Any]]) -> None:
    if case == "nodes" and len(ranks) != 4:
        pytest.skip("two nodes of two ranks")
    results = [rank["ddp"][case] if case in DDP else rank[case] for rank in ranks]
    for each in results:
        np.testing.assert_allclose(each["found"], results[0]["wanted"], rtol=1e-9, atol=1e-12)
        assert torch.equal(each["found"], results[0]["found"])
        assert each["layers"] == 4


def test_parameters_unused_somewhere_or_frozen_disturb_nobody(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert each["unused"]["frozen"]
        assert torch.equal(each["unused"]["found"], ranks[0]["unused"]["found"])


def test_an_infinite_gradient_skips_the_step_of_every_grad_scaler(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert each["scaler"]["scale"] == 512.0
        assert torch.isfinite(each["scaler"]["found"]).all()
        assert torch.equal(each["scaler"]["found"], ranks[0]["scaler"]["found"])


@pytest.mark.parametrize("case", [*OPTIMIZERS, "delta_ddp", "delta_accumulated"])
def test_delta_mode_moves_by_the_adasum_of_all_moves(case: str, ranks: list[dict[str, Any]]) -> None:
    results = [rank["delta"][case] if case in OPTIMIZERS else rank[case] for rank in ranks]
    for each in results:
        np.testing.assert_allclose(each["found"], results[0]["wanted"], rtol=1e-8, atol=1e-10)
        assert torch.equal(each["found"], results[0]["found"])


def test_delta_mode_skips_what_is_not_finite_on_any_rank_on_all(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert each["poisoned"]["same"] == [False, True, True, False]
        assert each["poisoned"]["skipped"] == 2
        assert torch.equal(each["poisoned"]["found"], ranks[0]["poisoned"]["found"])


def test_a_delta_step_that_fails_on_one_rank_happens_on_none(ranks: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(ranks):
        words = "no step here" if rank == 1 else "rank 1 cannot take part"
        assert len(each["failing"]["messages"]) == 2
        assert all(words in message for message in each["failing"]["messages"])
        assert each["failing"]["same"] == [True, True]
        assert torch.equal(each["failing"]["found"], ranks[0]["failing"]["found"])


def test_disagreement_is_one_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for position, trait in enumerate(("number of tensors", "shapes", "dtypes")):
        messages = {rank["disagreeing"][position] for rank in ranks}
        assert len(messages) == 1
        assert f"the ranks disagree on the {trait}" in messages.pop()
    assert "cannot take part" in ranks[0]["disagreeing"][3]
    assert "sparse" in ranks[1]["disagreeing"][3]


def test_what_is_no_list_of_tensors_is_an_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for position, words in ((4, "tensor 0 is None; give a tensor, zeros"), (5, "tensors is a single tensor")):
        assert "cannot take part" in ranks[0]["disagreeing"][position]
        assert words in ranks[1]["disagreeing"][position]


def test_groups_of_some_ranks_combine_theirs_alone(ranks: list[dict[str, Any]]) -> None:
    """One of the two has zeros, so the other's values are the result."""
    last = len(ranks) - 1
    for rank, each in enumerate(ranks):
        assert torch.equal(each["subgroup"], torch.full((5,), float(last if rank == 0 else rank)))


def test_without_torch_distributed_there_is_one_rank(tmp_path: Path) -> None:
    tensor = torch.randn(4)
    before = tensor.clone()
    statistics = adasum.all_reduce_([tensor])
    assert torch.equal(tensor, before)
    assert statistics.quantiles() == (1.0, 1.0, 1.0)
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = adasum.DeltaOptimizer(torch.optim.Adam(model.parameters()))
    plain = torch.optim.Adam(twin.parameters())
    for step in range(2):
        for each, its in ((optimizer, model), (plain, twin)):
            each.zero_grad()
            backward(loss_of(its, batch_of(step, 0, 0, 4)))
            each.step()
    np.testing.assert_allclose(flat(model), flat(twin), rtol=1e-12)


def test_delta_optimizer_refuses_to_scale_twice() -> None:
    model = make_model()
    inner = adasum.DeltaOptimizer(torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(ValueError, match="applied twice"):
        adasum.DeltaOptimizer(inner)
