"""AdaScale over DDP on gloo ranks, against one process that computes every rank's gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_scenarios import Outcome, Scenario, batch_of, expect, in_ranks, run
from stretto import AdaScale
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import LR, backward, loss_of, make_batch, make_model, parameters_of

WORLD = 3
EQUAL = ((4,), (4,), (4,))

SCENARIOS = {
    "equal": Scenario((EQUAL,) * 5),
    "small_buckets": Scenario((EQUAL,) * 3, ddp={"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}),
    "static_graph": Scenario((EQUAL,) * 3, ddp={"static_graph": True}),
    "unequal_with_total": Scenario((((32,), (8,), (5,)), EQUAL, ((1,), (1,), (40,))), announce="total"),
    "unequal_without_total": Scenario((((32,), (8,), (5,)), EQUAL, ((1,), (1,), (40,))), announce="count"),
    "an_empty_rank": Scenario((((4,), (0,), (4,)), EQUAL, ((0,), (0,), (7,)), EQUAL), announce="total"),
    "scale_below_one": Scenario((EQUAL,) * 3, base=30),
    "scale_changes": Scenario((EQUAL, ((16,),) * 3, ((64,),) * 3, ((1,),) * 3, ((4,), (16,), (1,))), announce="total"),
    "poisoned": Scenario((EQUAL,) * 4, poisoned=2),
    "accumulated": Scenario((((4, 4),) * 3,) * 3, accumulation=2),
    "short_window": Scenario((((4, 4, 4),) * 3, ((4, 4),) * 3, ((4, 4, 4),) * 3), accumulation=3),
    "accumulated_unequal": Scenario(
        (((4, 4), (2, 7), (0, 3)), ((0, 0), (2, 1), (1, 9))), accumulation=2, announce="total"
    ),
    "synchronised_each_time": Scenario((((4, 4),) * 3,) * 3, accumulation=2, no_sync=False),
}


class Forked(nn.Module):
    """Rank 0 leaves one of two layers unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 2, dtype=torch.float64)
        self.second = nn.Linear(6, 2, dtype=torch.float64)
        self.never = nn.Linear(6, 2, dtype=torch.float64)
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.second(x) if self.both else self.first(x)
        return out


def work_of_three_ranks(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {name: vars(run(scenario, rank)) for name, scenario in SCENARIOS.items()}
    results["errors"] = refused(rank)
    results["composed"] = composed_hook(rank)
    results["unused"] = unused_on_one_rank(rank)
    results["rebound"] = rebound(rank)
    results["freed"] = wrapper_is_freed()
    return results


def refused(rank: int) -> list[str]:
    """Wrong sample counts: each one's message on this rank, and whether anything moved."""
    model = make_model()
    wrapped = DistributedDataParallel(model)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=4)
    before, messages = parameters_of(model), []
    for total in (11, 12 + rank, 12 if rank == 1 else None):
        ada.zero_grad()
        if total is not None:
            ada.set_num_samples(5 if rank == 1 else 4, total=total)
        backward(loss_of(wrapped, batch_of(0, rank, 0, 5 if rank == 1 else 4)))
        with pytest.raises(ValueError, match="set_num_samples") as error:
            ada.step()
        messages.append(str(error.value))
    np.testing.assert_array_equal(parameters_of(model), before)
    assert ada.tau == 0.0
    ada.rebind(DistributedDataParallel(model), accumulation_steps=2)
    local = DistributedDataParallel(model)
    ada.rebind(local)
    for micro in range(2):
        with local.no_sync():
            backward(loss_of(local, batch_of(0, rank, micro, 4)) / 2)
    with pytest.raises(ValueError, match="no_sync") as error:
        ada.step()
    messages.append(str(error.value))
    with pytest.raises(ValueError, match="DDP takes one only"):
        ada.rebind(local)
    with pytest.raises(ValueError, match="not wrapped in DDP"):
        ada.rebind(model)
    return messages


def composed_hook(rank: int) -> dict[str, Any]:
    """A user's hook that averages in its own way, with unequal sizes."""
    calls: list[int] = []

    def hook(state: str, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # torch's own name
        assert state == "mine"
        calls.append(bucket.index())
        buffer = bucket.buffer().div_(WORLD)
        future = dist.all_reduce(buffer, async_op=True).get_future()
        averaged: torch.futures.Future[Tensor] = future.then(lambda done: done.value()[0])
        return averaged

    model = make_model()
    wrapped = DistributedDataParallel(model)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=4, comm_hook=("mine", hook))
    for step, sizes in enumerate(SCENARIOS["unequal_with_total"].steps):
        ada.zero_grad()
        n = sizes[rank][0]
        ada.set_num_samples(n, total=sum(map(sum, sizes)))
        backward(loss_of(wrapped, batch_of(step, rank, 0, n)))
        ada.step()
    return {"gain": ada.gain, "tau": ada.tau, "parameters": parameters_of(model), "calls": len(calls)}


def unused_on_one_rank(rank: int) -> dict[str, Any]:
    model = Forked()
    model.both = rank != 0
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=4)
    for step in range(3):
        ada.zero_grad()
        backward(loss_of(wrapped, batch_of(step, rank, 0, 4)))
        ada.step()
    return {"gain": ada.gain, "tau": ada.tau, "parameters": parameters_of(model)}


def rebound(rank: int) -> dict[str, Any]:
    """Three ranks, then two of them, then one, then three again; averages and tau go on."""
    pair = dist.new_group([0, 1])
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1000)
    ada = AdaScale(inner, DistributedDataParallel(model), base_batch_size=4, scheduler=scheduler)
    saved: dict[str, Any] = {}
    wrapped: nn.Module = DistributedDataParallel(model)
    for step, group in enumerate((None, None, pair, pair, None)):
        if group is pair and rank == 2:
            continue
        if step in (0, 2, 4):
            if step == 4:
                for tensor in [*model.parameters(), *(inner.state[p]["momentum_buffer"] for p in model.parameters())]:
                    dist.broadcast(tensor.detach(), 0)
                box = [ada.state_dict()]
                dist.broadcast_object_list(box, 0)
                ada.load_state_dict(box[0])
            wrapped = DistributedDataParallel(model, process_group=group)
            ada.rebind(wrapped)
        ada.zero_grad()
        backward(loss_of(wrapped, batch_of(step, rank, 0, 4)))
        ada.step()
        saved[f"step {step}"] = (ada.world_size, ada.scale, ada.gain, ada.tau, scheduler.last_epoch)
    saved["parameters"] = parameters_of(model)
    return saved


def wrapper_is_freed() -> bool:
    """An old DDP goes without the garbage collector, so that its sockets and buckets do."""
    import gc
    import weakref

    model = make_model()
    wrapped = DistributedDataParallel(model)
    ada = AdaScale(torch.optim.SGD(model.parameters(), lr=LR), wrapped, base_batch_size=4)
    backward(loss_of(wrapped, make_batch(4, 1)))
    ada.step()
    gone = weakref.ref(wrapped)
    gc.disable()
    ada.unbind()
    del wrapped
    freed = gone() is None
    gc.enable()
    return freed


def results_of(world_size: int, folder: Path, work: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    spawn(in_ranks, (world_size, str(folder), work), nprocs=world_size)  # type: ignore[no-untyped-call]  # torch's
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(WORLD, tmp_path_factory.mktemp("three"), work_of_three_ranks)


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_agree_with_one_process_that_sees_everything(name: str, three_ranks: list[dict[str, Any]]) -> None:
    expected = expect(SCENARIOS[name])
    assert max(expected.gains) > 1.01 or name == "scale_below_one"
    for results in three_ranks:
        outcome = Outcome(**results[name])
        assert outcome.scales == pytest.approx(expected.scales)
        assert outcome.gains == pytest.approx(expected.gains, rel=1e-9)
        assert outcome.taus == pytest.approx(expected.taus, rel=1e-9)
        assert outcome.skipped == expected.skipped
        np.testing.assert_allclose(outcome.parameters, expected.parameters, rtol=1e-9)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_applies_the_bit_identical_gain(name: str, three_ranks: list[dict[str, Any]]) -> None:
    first = Outcome(**three_ranks[0][name])
    for results in three_ranks[1:]:
        other = Outcome(**results[name])
        assert (other.gains, other.taus) == (first.gains, first.taus)
        np.testing.assert_array_equal(other.parameters, first.parameters)


def test_agreement_numbers_are_summed_over_the_ranks_in_every_step(
    three_ranks: list[dict[str, Any]],
) -> None:
    for results in three_ranks:
        assert results["equal"]["agreed"][:3] == [[3.0, 3.0, 1.0], [3.0, 3.0, 3.0], [3.0, 3.0, 1.0]]
        assert results["poisoned"]["agreed"][2] == [3.0, 3.0, 1.0]  # exchanged in a skipped step too


def test_wrong_sample_counts_stop_the_step_on_every_rank(three_ranks: list[dict[str, Any]]) -> None:
    wrong_total, different_totals, total_on_one_rank, unsynchronised = zip(
        *(results["errors"] for results in three_ranks), strict=True
    )
    assert {"total is 11, but the ranks used 13" in message for message in wrong_total} == {True}
    assert {"different totals" in message for message in different_totals} == {True}
    assert {"the ranks used 13" in message for message in total_on_one_rank} == {True}
    assert {"no_sync" in message for message in unsynchronised} == {True}


def test_a_hook_of_the_users_own_is_composed(three_ranks: list[dict[str, Any]]) -> None:
    expected = expect(SCENARIOS["unequal_with_total"])
    for results in three_ranks:
        composed = results["composed"]
        assert composed["calls"] >= 3
        assert (composed["gain"], composed["tau"]) == pytest.approx((expected.gains[-1], expected.taus[-1]))
        np.testing.assert_allclose(composed["parameters"], expected.parameters[-1], rtol=1e-9)


def test_parameters_unused_on_one_rank_or_on_all_count_as_zeros(three_ranks: list[dict[str, Any]]) -> None:
    first = three_ranks[0]["unused"]
    assert 1.0 < first["gain"] < WORLD
    for results in three_ranks[1:]:
        assert results["unused"]["gain"] == first["gain"]
        np.testing.assert_array_equal(results["unused"]["parameters"], first["parameters"])


def test_averages_and_tau_go_on_over_new_wrappers_of_any_size(three_ranks: list[dict[str, Any]]) -> None:
    first = three_ranks[0]["rebound"]
    assert [first[f"step {step}"][:2] for step in range(5)] == [(3, 3.0), (3, 3.0), (2, 2.0), (2, 2.0), (3, 3.0)]
    taus = [first[f"step {step}"][3] for step in range(5)]
    gains = [first[f"step {step}"][2] for step in range(5)]
    assert taus == pytest.approx(np.cumsum(gains))
    assert [first[f"step {step}"][4] for step in range(5)] == [int(tau) for tau in taus]
    for results in three_ranks[1:]:
        assert results["rebound"]["step 4"] == first["step 4"]
        np.testing.assert_array_equal(results["rebound"]["parameters"], first["parameters"])


def test_an_old_wrapper_is_freed_without_the_garbage_collector(three_ranks: list[dict[str, Any]]) -> None:
    assert [results["freed"] for results in three_ranks] == [True] * WORLD


def lose_a_rank(rank: int) -> dict[str, Any]:
    """Rank 1 dies between its backward and its step."""
    model = make_model()
    wrapped = DistributedDataParallel(model)
    inner = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    ada = AdaScale(inner, wrapped, base_batch_size=4)
    for step in range(2):
        ada.zero_grad()
        backward(loss_of(wrapped, batch_of(step, rank, 0, 4)))
        if step == 1 and rank == 1:
            os._exit(0)
        before = (parameters_of(model), str(ada.state_dict()["adascale"]), ada.agreed)
        if step == 0:
            ada.step()
    with pytest.raises(RuntimeError):
        ada.step()
    np.testing.assert_array_equal(parameters_of(model), before[0])
    return {"unchanged": (str(ada.state_dict()["adascale"]), ada.agreed) == before[1:]}


def test_a_rank_that_dies_in_a_step_drops_the_step_whole(tmp_path: Path) -> None:
    spawn(in_ranks, (2, str(tmp_path), lose_a_rank), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
    assert torch.load(tmp_path / "rank-0.pt", weights_only=True) == {"unchanged": True}
