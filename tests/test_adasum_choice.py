"""Which algorithm "auto" takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adasum_world import ThreadTransport, in_threads
from stretto.adasum import reducer as reducer_module
from stretto.adasum.reducer import Reducer


@pytest.mark.parametrize(
    ("world_size", "sizes", "dtype", "peers", "chosen"),
    [
        (2, [4] * 100, torch.float32, True, "gram"),
        (8, [4] * 100, torch.float32, True, "rvh"),
        (8, [4] * 100, torch.float32, False, "gram"),
        (8, [4] * 100, torch.bfloat16, True, "gram"),
        (8, [4] * 100, torch.float64, True, "gram"),
        (8, [1000] * 100, torch.float32, True, "gram"),
    ],
)
def test_halving_only_where_gram_matrices_outweigh_the_gradients(
    world_size: int,
    sizes: list[int],
    dtype: torch.dtype,
    peers: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any) -> Any:
            seen.append(name)
            return function(*arguments)

        return watching

    for name in ("reduce_by_gram", "reduce_by_halving"):
        monkeypatch.setattr(reducer_module, name, watched(name, getattr(reducer_module, name)))

    def work(transport: ThreadTransport) -> None:
        Reducer(transport).reduce([torch.randn(size).to(dtype) for size in sizes])

    in_threads(world_size, work, peers=peers)
    assert set(seen) == {{"gram": "reduce_by_gram", "rvh": "reduce_by_halving"}[chosen]}
