"""NCCL in a group that a cut must be able to end: what torch is told beforehand, how the members meet, how it ends.

Its operations run on the GPU and wait there for the peers; the only way to end one is to abort the communicator. While
the members meet, NCCL waits in the calling thread, where nothing ends it: so they meet in a thread that can be left
behind.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import DebugLevel, get_debug_level  # torch.distributed re-exports them silently

from stretto.errors import Fatal
from stretto.group.plan import GroupSettings

_log = logging.getLogger(__name__)

# With any other value torch ends the process, or waits, where we want to go on. Read when a group is made.
_ENVIRONMENT = {
    # Failed operations are ours to end. torchrun says 1, with which torch ends the process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # 1 would overrule that.
    "TORCH_NCCL_DESYNC_DEBUG": "0",
    # 1 would leave NCCL without the thread that notices its errors.
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    # 1 would end the process some time after that thread has ended, as it does after an abort that took long.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # After an error that thread would sleep for four times this, with a lock that every operation needs.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    # 1 would have NCCL's threads ask the leader's store again and again; it may be dead.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}

# What the user may say otherwise.
_DEFAULTS = {
    # Calls that wait for peers return, and are waited for with a limit, instead of waiting inside of NCCL for ever.
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
    # All connections are made when the members meet: not at an algorithm's first use, when one of them may be late.
    "NCCL_RUNTIME_CONNECT": "0",
}


def device_for(backend: str | None, device: torch.device) -> torch.device | None:
    """The GPU whose tensors go over NCCL, or None: then everything goes over gloo, by way of the host.

    backend: "nccl", "gloo", or None, which is nccl on GPUs and gloo elsewhere.
    """
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f"backend is {backend!r}; allowed in in-process mode: 'nccl', 'gloo', or None to choose one")
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend is 'nccl', but the device is {device}: NCCL needs a GPU; take 'gloo', or None")
    return device if backend != "gloo" and device.type == "cuda" else None


def prepare(device: torch.device, settings: GroupSettings) -> None:
    """Set the environment that torch reads when it makes groups; ValueError where NCCL cannot be used."""
    if device.type != "cuda" or device.index is None:
        raise ValueError(f"NCCL needs a GPU with its number, such as cuda:0, not {device}")
    if not dist.is_nccl_available():
        raise ValueError("this torch was built without NCCL: install one for CUDA, or take the backend 'gloo'")
    if get_debug_level() == DebugLevel.DETAIL:
        raise ValueError(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch end this process when a peer of NCCL fails: set it to INFO or "
            "OFF, or take the backend 'gloo'"
        )
    os.environ.update(_ENVIRONMENT)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["TORCH_NCCL_NONBLOCKING_TIMEOUT"] = str(math.ceil(settings.formation_limit_s))


class Meeting:
    """The members of a group meeting in NCCL, in a thread of its own.

    `backend`: NCCL's part of the group. Its first operation forms the communicator; there is no other way to wait for
    that. The thread ends when they have met, when the meeting was aborted, or within `formation_limit_s` otherwise.
    """

    def __init__(self, backend: Any, device: torch.device, world_size: int) -> None:
        self._over = threading.Event()
        self._error: Exception | None = None
        arguments = (backend, device, world_size)
        threading.Thread(target=self._run, args=arguments, name="stretto-nccl-meeting", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether all have met within this time. Raises what went wrong; Fatal if it would go wrong again."""
        if not self._over.wait(timeout_s):
            return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self, backend: Any, device: torch.device, world_size: int) -> None:
        try:
            met = count_members(backend, device)
            if met != world_size:
                raise RuntimeError(f"NCCL counted {met:g} members where {world_size} were expected")
        except Exception as error:  # noqa: BLE001 - torch raises several kinds
            self._error = _judged(error.with_traceback(None), device)
        self._over.set()


def count_members(backend: Any, device: torch.device) -> float:
    """Add up a one from every member; waits for all of them."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
    with torch.cuda.stream(stream):
        count = torch.ones(1, device=device)
        backend.allreduce([count]).wait()
    stream.synchronize()
    return float(count)


def abort(backend: Any, *, after_s: float = 0.0) -> None:
    """End every operation of NCCL's part of a group, for a thread that may wait: it takes until the GPU lets go."""
    time.sleep(after_s)
    try:
        backend.abort()
    except Exception as error:  # noqa: BLE001 - torch raises several kinds; the generation is over all the same
        _log.warning("NCCL could not be aborted: %s", error)


def _judged(error: Exception, device: torch.device) -> Exception:
    if "ncclInvalidUsage" not in str(error):
        return error
    fatal = Fatal(
        f"NCCL refuses {device}: every worker needs a GPU of its own, so start no more workers on a node than it has "
        f"GPUs, or take the backend 'gloo' ({error})"
    )
    fatal.__cause__ = error
    return fatal
