"""A worker process whose group believes that it uses NCCL: gloo does the work, in NCCL's manners.

Tensors of float32 count as those on the GPU. To torch their operations are done at once; only a mark tells when they
have ended, and one that has lost its peer never ends, whatever becomes of its sockets.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from group.member import Worker
from group.member import main as member_main
from stretto.group import GroupSettings, live, nccl, operations, torch_private
from torch import Tensor

_newest = threading.local()  # the operation that the current thread has begun last


class Work:
    """Torch's work, if it were NCCL's."""

    def __init__(self, inner: torch.futures.Future[Any]) -> None:
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(None)
        _newest.operation = inner

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future

    def get_future_result(self) -> torch.futures.Future[Any]:
        return torch.futures.Future()  # its thread never finds anything out


class Gpu:
    def __init__(self, device: torch.device) -> None:
        pass

    def mark(self) -> Callable[[], bool]:
        operation: torch.futures.Future[Any] = _newest.operation
        return lambda: operation.done() and _succeeded(operation)

    @contextmanager
    def beside(self) -> Any:
        yield


class Part:
    """NCCL's part of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def abort(self) -> None:
        NcclWorker.aborts += 1


class Operations(operations.Operations):
    def start(self, begin: Callable[[], Any], result: Any) -> torch.futures.Future[Any]:
        on_gpu = bool(operations.gpus_of(result))
        return super().start(lambda: Work(begin().get_future()) if on_gpu else begin(), result)


class NcclWorker(Worker):
    nccl_device = torch.device("cuda", 0)
    aborts = 0
    dies_in_meeting = False

    def do_aborts(self) -> None:
        assert self._life._reaper.wait(60)
        self._tell("aborts", count=NcclWorker.aborts)

    def do_die_in_meeting(self) -> None:
        NcclWorker.dies_in_meeting = True
        self._tell("done")


def _succeeded(operation: torch.futures.Future[Any]) -> bool:
    try:
        operation.value()
    except RuntimeError:
        return False
    return True


def _meet(part: Part, device: torch.device) -> float:
    if NcclWorker.dies_in_meeting:
        os.kill(os.getpid(), signal.SIGKILL)
    count = torch.ones(1, dtype=torch.float64)
    part.group.allreduce([count]).wait()
    return float(count)


def _on_gpu(result: object) -> list[torch.device]:
    return [NcclWorker.nccl_device] if isinstance(result, Tensor) and result.dtype == torch.float32 else []


_STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (torch_private, "GLOO_AND_NCCL", torch_private.GLOO),
    (torch_private, "nccl_of", Part),
    (nccl, "prepare", lambda device, settings: None),
    (nccl, "count_members", _meet),
    (operations, "gpus_of", _on_gpu),
    (operations, "new_future", lambda devices: torch.futures.Future()),
    (live, "Gpu", Gpu),
    (live, "Operations", Operations),
)


def main(pipe: Connection, settings: GroupSettings) -> None:
    for module, name, stand_in in _STAND_INS:
        setattr(module, name, stand_in)
    member_main(pipe, settings, NcclWorker)
