"""Which backend a live worker's tensors go over: what a script says reaches the group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stretto import live
from stretto.membership import open_membership
from stretto.trainer_settings import TrainerSettings
from stretto_proto.v1 import types_pb2

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_an_agent_starts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A live worker's environment; and a torch without NCCL, so that nobody gets further than the choice."""
    for name, value in {
        "STRETTO_MODE": "in-process",
        "STRETTO_ENDPOINT": "127.0.0.1:1",
        "STRETTO_JOB": "job",
        "STRETTO_NODE": "node",
        "STRETTO_ADDRESS": "127.0.0.1",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("STRETTO_AGENT_PID", raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)


def open_with(backend: str | None, device: torch.device) -> None:
    open_membership(
        types_pb2.JobSpec(), TrainerSettings(backend=backend), device, saves=False, on_commit=lambda step: None
    )


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_a_trainer_on_a_gpu_takes_nccl(backend: str | None) -> None:
    with pytest.raises(ValueError, match="this torch was built without NCCL"):
        open_with(backend, GPU)


def test_a_trainer_that_cannot_have_its_backend_says_so() -> None:
    with pytest.raises(ValueError, match="backend is 'nccl', but the device is cpu"):
        open_with("nccl", CPU)
    with pytest.raises(ValueError, match="backend is 'mpi'; allowed in in-process mode: 'nccl', 'gloo'"):
        open_with("mpi", GPU)


def test_a_loop_of_ones_own_says_where_its_model_is() -> None:
    sizes = {"base_batch_size": 4, "batch_size": 4, "target_tau": 1.0}
    with pytest.raises(ValueError, match="this torch was built without NCCL"):
        live.join(**sizes, device="cuda:0")  # type: ignore[arg-type]  # mypy sees one type for all values
    with pytest.raises(ValueError, match="NCCL needs a GPU with its number, such as cuda:0, not cuda"):
        live.join(**sizes, device="cuda")  # type: ignore[arg-type]
