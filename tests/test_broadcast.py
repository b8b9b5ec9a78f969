"""Rank 0's state reaches all ranks as it is, and nothing is unpickled on the way."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import stretto
import torch
from saving.fsdp_ranks import launch
from saving.likeness import same
from stretto.broadcast import broadcast


def _state() -> dict[str, Any]:
    tied = torch.arange(6.0).reshape(2, 3)
    return {
        "step": 7,
        "model": {"a": tied, "b": tied, "turned": tied.t(), "empty": torch.empty(0, 3)},
        "optimizer": {0: {"exp_avg": torch.ones(5, dtype=torch.bfloat16)}, "betas": (0.9, float("inf"))},
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2**60),
        "none": None,
    }


def _receive(rank: int, world_size: int) -> dict[str, Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is unpickled")

    pickle.loads = pickle.Unpickler = refuse  # type: ignore[misc,assignment]  # this process ends here
    received = broadcast(_state() if rank == 0 else None, torch.device("cpu"))
    expected = _state()
    expected["model"]["turned"] = received["model"]["turned"] if rank == 0 else expected["model"]["turned"].contiguous()
    return {"same": same(received, expected), "tied": received["model"]["a"] is received["model"]["b"]}


def test_all_ranks_have_rank_0s_state(tmp_path: Path) -> None:
    assert launch(_receive, 3, tmp_path / "out") == [{"same": True, "tied": True}] * 3


def test_the_worker_library_unpickles_nothing() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "torch.load", "torch.save"}
    forbidden |= {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}
    forbidden |= {"send_object_list", "recv_object_list"}
    for file in Path(stretto.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                names = {node.attr, ast.unparse(node)}
            assert not names & forbidden, f"{file.name}: {ast.unparse(node)}"
