"""Worker processes of the GPU tests: those of the transfer tests, with their tensors on a GPU."""

from __future__ import annotations

import copy
from collections import OrderedDict
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import rank_scenarios
import torch
from group.member import all_reduce_bucket
from group.member import main as member_main
from stretto.errors import Fatal
from stretto.group import GroupSettings
from stretto.group.completions import Gpu
from stretto.transfer import fingerprint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import Batch, backward, make_model
from transfer import trainee
from transfer.states import mixed_state

_BUSY_CYCLES = 10_000_000_000  # five to ten seconds of a GPU


class CudaTrainee(trainee.Trainee):
    """Each job is answered by one event. The group uses gloo, by way of the host."""

    device = torch.device("cuda", 0)

    def do_build(self, generation: int, rank: int, members: list[tuple[int, int]], leader: int, fault: str) -> None:
        try:
            super().do_build(generation, rank, members, leader, fault)
        except Fatal as error:
            self._tell("refused", reason=str(error))

    def do_busy(self) -> None:
        """Wait for an operation that the GPU begins in seconds; `done` of the answer: 1 if it still had not by then."""
        group = self._held()
        torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]  # torch's own
        ended = Gpu(self.device).mark()
        future = group.all_reduce(torch.ones(4, device=self.device))
        self._tell("begun")
        self._report("done", lambda: group.wait(future), lambda: int(not ended()))

    def do_hold_mixed(self, seed: int) -> None:
        self._state = self._state_of(seed)
        self._tell("held", print=fingerprint(self._state))

    def do_compare_mixed(self, seed: int) -> None:
        with mock.patch.object(trainee, "mixed_state", self._state_of):
            super().do_compare_mixed(seed)

    def do_begin_adascale(self, accumulation: int, base: int) -> None:
        with mock.patch.object(trainee, "make_model", return_value=make_model().to(self.device)):
            super().do_begin_adascale(accumulation, base)

    def do_adascale(self, scenario: rank_scenarios.Scenario, first: int, stop: int, dies: str = "") -> None:
        batch_of = rank_scenarios.batch_of

        def on_gpu(step: int, rank: int, micro: int, size: int) -> Batch:
            x, y = batch_of(step, rank, micro, size)
            return x.to(self.device), y.to(self.device)

        with mock.patch.object(rank_scenarios, "batch_of", on_gpu):
            super().do_adascale(scenario, first, stop, dies)

    def do_batch_norm(self) -> None:
        """Take gradients through SyncBatchNorm; `done`: 1 if one process finds the same with everybody's samples."""
        group = self._held()
        torch.manual_seed(3)
        alone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double().to(self.device)
        together: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))  # type: ignore[no-untyped-call]  # torch's own
        samples = torch.randn(4 * group.world_size, 6, dtype=torch.float64, device=self.device)
        own = samples[4 * group.rank : 4 * group.rank + 4]
        wrapped = DistributedDataParallel(
            together,
            device_ids=[self.device.index],
            process_group=group.process_group,
            init_sync=False,
            broadcast_buffers=False,
        )
        wrapped.register_comm_hook(group, all_reduce_bucket)
        equal = False

        def take() -> None:
            nonlocal equal
            backward(wrapped(own).square().sum())
            group.wait(group.all_reduce(torch.ones(1)))
            backward(alone(samples).square().sum())
            pairs = zip(_gradients(together), _gradients(alone), strict=True)
            equal = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)

        self._tell("begun")
        self._report("taken", take, lambda: int(equal))

    def _state_of(self, seed: int) -> dict[str, Any]:
        """Of every kind of value; tensors on the GPU, but for some that stay on the host."""
        state = mixed_state(seed)
        memo: dict[int, Tensor] = {}
        return {name: value if name == "odd" else self._moved(value, memo) for name, value in state.items()}

    def _moved(self, value: Any, memo: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            return memo.setdefault(id(value), value.to(self.device))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._moved(each, memo)) for key, each in value.items())
        return [self._moved(each, memo) for each in value] if type(value) is list else value


class NcclTrainee(CudaTrainee):
    """The group uses NCCL, from a GPU of this process's own."""


def gloo_main(pipe: Connection, settings: GroupSettings) -> None:
    """Run a worker on the first GPU, whoever else is there."""
    member_main(pipe, settings, CudaTrainee)


class NcclOn:
    """Runs a worker that uses NCCL from the GPU of this number."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(self, pipe: Connection, settings: GroupSettings) -> None:
        device = torch.device("cuda", self._index)
        torch.cuda.set_device(device)
        NcclTrainee.device = NcclTrainee.nccl_device = device
        member_main(pipe, settings, NcclTrainee)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
