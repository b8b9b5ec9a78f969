"""AdaScale in plain DDP loops of two gloo ranks, in every way that torch offers."""

from __future__ import annotations

import pytest
import torch
from ddp_variants import VARIANTS, run_all
from rank_scenarios import in_ranks
from torch.multiprocessing.spawn import spawn


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("two")
    spawn(in_ranks, (2, str(folder), run_all), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gain_is_right_with(name: str, two_ranks: list[dict[str, str]]) -> None:
    errors = [results[name] for results in two_ranks]
    assert not any(errors), "\n".join(errors)
