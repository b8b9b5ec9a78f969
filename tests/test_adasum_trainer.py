"""ElasticTrainer and AdaScale under rule "adasum" and "adasum-delta": one process and gloo ranks, no controller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adasum_world import ThreadTransport, in_threads
from rank_scenarios import batch_of, in_ranks
from stretto import AdaScale, adasum
from stretto.adasum.rank_states import RankStates, choose, mean_of
from stretto.adasum.reducer import Alone
from stretto.combining import leaves_of
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import LR, backward, gradient_of, loss_of, make_model
from trainer_run import Plan, train, train_on_ranks

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters),
}


@pytest.mark.parametrize("rule", ["adasum", "adasum-delta"])
def test_on_one_process_it_is_the_plain_optimizer(rule: str) -> None:
    plain, parameters = train(Plan(rule="identity"))
    reports, combined = train(Plan(rule=rule))
    assert [report.tau for report in reports] == [report.tau for report in plain]
    assert combined == pytest.approx(parameters, rel=1e-12)


@pytest.mark.parametrize("rule", ["adasum", "adasum-delta"])
def test_tau_grows_by_one_per_step_and_the_rate_is_the_schedules_own(rule: str, tmp_path: Path) -> None:
    reports, _ = train_on_ranks(Plan(rule=rule, target_tau=30.0), 3, tmp_path)
    assert [report.tau for report in reports] == [float(step) for step in range(1, 31)]
    assert {report.scale for report in reports[:4]} == {3.0}
    assert [report.effective_lr[0] for report in reports] == pytest.approx([0.05 * 0.98**step for step in range(30)])
    assert reports[-1].loss < reports[0].loss
    # In delta mode gradients are not compared: the gain says nothing.
    assert max(report.gain for report in reports) > 1.01 if rule == "adasum" else reports[-1].gain == 1.0


def test_delta_mode_goes_on_from_a_checkpoint_with_every_ranks_own_state(tmp_path: Path) -> None:
    """At the same size it is as if nothing had happened; at others every rank still finds a state."""
    plan = Plan(rule="adasum-delta", target_tau=20.0, checkpoint=str(tmp_path / "checkpoints"))
    settings = {"checkpoint_interval_steps": 5}
    runs = {name: tmp_path / name for name in ("whole", "first", "second", "larger")}
    for path in runs.values():
        path.mkdir()
    whole, parameters = train_on_ranks(Plan(rule="adasum-delta", target_tau=20.0), 2, runs["whole"])
    first, _ = train_on_ranks(replace(plan, steps=11, settings=settings), 2, runs["first"])
    second, resumed = train_on_ranks(plan, 2, runs["second"])
    assert 6 <= second[0].step <= 11, "from the newest checkpoint"
    assert first[: second[0].step - 1] + second == whole
    assert resumed == parameters
    larger, _ = train_on_ranks(replace(plan, target_tau=30.0), 3, runs["larger"])
    assert [report.step for report in larger] == list(range(21, 31))


def adascale_norms(rank: int) -> dict[str, Any]:
    """The gain that AdaScale would have at these gradients, under both rules: parameters differ, statistics do not."""
    gains: dict[str, list[float]] = {}
    for rule in ("identity", "adasum"):
        model = make_model()
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)
        ada = AdaScale(torch.optim.SGD(model.parameters(), lr=0.0), wrapped, base_batch_size=4, rule=rule)
        gains[rule] = []
        for step in range(4):
            ada.zero_grad()
            sizes = (4, 8, 3)
            ada.set_num_samples(sizes[rank], total=sum(sizes))
            backward(loss_of(wrapped, batch_of(step, rank, 0, sizes[rank])))
            ada.step()
            gains[rule].append(ada.gain)
    with pytest.raises(ValueError, match="scales the learning rate too"):
        AdaScale(
            torch.optim.SGD(model.parameters(), lr=LR),
            DistributedDataParallel(model),
            base_batch_size=4,
            comm_hook=adasum.ddp_hook,
        )
    return gains


def test_adascales_norms_come_with_the_gram_matrices(tmp_path: Path) -> None:
    spawn(in_ranks, (3, str(tmp_path), adascale_norms), nprocs=3)  # type: ignore[no-untyped-call]  # torch's
    for rank in range(3):
        gains = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert gains["adasum"] == pytest.approx(gains["identity"], rel=1e-9)
        assert gains["adasum"][-1] > 1.01


def test_one_switch_never_two_scalings() -> None:
    model = make_model()
    delta = adasum.DeltaOptimizer(torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(ValueError, match='the rule is "adasum-delta"'):
        AdaScale(delta, model, base_batch_size=4)
    with pytest.raises(ValueError, match=r"pass stretto\.adasum\.DeltaOptimizer"):
        AdaScale(torch.optim.SGD(model.parameters(), lr=LR), model, base_batch_size=4, rule="adasum-delta")


def test_ranks_are_ordered_by_node_and_worker_whatever_their_ranks_are() -> None:
    members = (("node-b", 0), ("node-a", 1), ("node-b", 1), ("node-a", 0))
    assert leaves_of(members, mean_in_node=False) == ((3,), (1,), (0,), (2,))
    assert leaves_of(members, mean_in_node=True) == ((3, 1), (0, 2))


def test_saved_states_go_to_their_members_then_in_order_then_none_is_left() -> None:
    assert choose(["a", "b", "c"], ["c", "a", "b"]) == [2, 0, 1]
    assert choose(["a", "b", "c"], ["a", "x", "y", "z"]) == [0, 1, 2, None]
    assert choose(["a", "b"], ["b"]) == [1]


def stepped(make: Callable[[Any], torch.optim.Optimizer], seed: int, steps: int = 2) -> torch.optim.Optimizer:
    model = make_model()
    optimizer = make(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        backward(loss_of(model, batch_of(step, seed, 0, 4)))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", MAKERS)
def test_who_goes_on_keeps_its_state_and_who_joins_gets_their_mean(name: str) -> None:
    """Ranks 0 and 2 go on; 1 and 3 join and have been given rank 0's state, as everybody else."""
    seeding = threading.Lock()  # models are seeded by torch's own generator

    def work(transport: ThreadTransport) -> tuple[Any, Any, Any]:
        with seeding:
            optimizers = {rank: stepped(MAKERS[name], rank) for rank in (0, 2)}
        old = {rank: optimizer.state_dict()["state"] for rank, optimizer in optimizers.items()}
        with seeding:
            mine = optimizers.get(transport.rank) or MAKERS[name](make_model().parameters())
        states = RankStates(mine)
        if transport.rank in old:
            states.settle(["before/0"], Alone(), loaded=False)
        states.keep()
        mine.load_state_dict({"state": old[0], "param_groups": mine.state_dict()["param_groups"]})
        states.settle([f"n{rank}/0" for rank in range(4)], transport, loaded=True)
        after = {key: dict(entries) for key, entries in mine.state_dict()["state"].items()}
        states.gather([f"n{rank}/0" for rank in range(4)], transport)
        return old, after, states.state_dict()

    results = in_threads(4, work)
    old = results[0][0]
    mean = mean_of([old[0], old[2]])
    for rank, (_, after, _) in enumerate(results):
        wanted = old.get(rank, mean)
        for parameter, entries in wanted.items():
            for entry, value in entries.items():
                torch.testing.assert_close(after[parameter][entry], value, rtol=1e-6, atol=1e-12)
    gathered = results[0][2]
    assert gathered["members"] == ["n0/0", "n1/0", "n2/0", "n3/0"]
    for rank, (_, after, held) in enumerate(results):
        assert held["members"] == gathered["members"]
        for parameter, entries in after.items():
            for entry, value in entries.items():
                assert torch.equal(gathered["states"][rank][parameter][entry], value)


def test_a_gradient_is_a_gradient() -> None:
    """Adasum of one rank's gradients is that rank's own, however many layers."""
    gradient = torch.from_numpy(gradient_of(make_model(), batch_of(0, 0, 0, 4)))
    assert torch.equal(adasum.combine([[gradient]])[0], gradient)
