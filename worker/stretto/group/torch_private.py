"""The only place that touches private parts of torch and of gloo. tests/group/test_torch_private.py pins each of them.

What is used, and why there is no public way (torch 2.13):
- `distributed_c10d._world`, `_update_default_pg`, `_unregister_all_process_groups`: `destroy_process_group` shuts the
  group down on the spot and waits for its operations; we must forget a group without waiting.
- `_world.group_count`: a failed `init_process_group` leaves it raised, and it is part of the keys in the store.
- what gloo writes to the store, and the number that a connecting peer sends first: to stand in for a peer that never
  comes; under which keys NCCL meets there.
- `Future._set_unwrap_func`: see `fail`.
- `ProcessGroup._get_backend`: `_abort_process_group` would forget every group too, and `ProcessGroup.abort` ends gloo's
  part as well, which has no working one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (  # torch.distributed re-exports them without saying so
    Store,
    _unregister_all_process_groups,
)
from torch.distributed import distributed_c10d as c10d

from stretto.group import sockets
from stretto.group.plan import Plan
from stretto.group.sockets import Endpoint

# The keys under which the default group's ranks tell each other how to meet in NCCL: group 0, its backend for CUDA.
NCCL_KEYS = "0//cuda//"
# By this key NCCL's watchdogs ask all ranks for a dump, through whatever store they have.
DUMP_KEY = "exception_dump"
GLOO = "gloo"  # for tensors on any device: those of an accelerator go through the host
GLOO_AND_NCCL = "cpu:gloo,cuda:nccl"

_LENGTH = struct.Struct("=Q")
_FAILED = object()  # no tensor: DDP raises when it finds this in a communication hook's future
_SEQUENCE_NUMBER = struct.Struct("=q")


@dataclass(frozen=True)
class Listener:
    """Where one rank's gloo listens, and the number that it expects each peer (by rank) to send first."""

    end: Endpoint
    sequence_numbers: tuple[int, ...]


def parse_listener(value: bytes) -> Listener:
    """Read what gloo writes to its store: host name, socket address with a number, numbers by rank.

    Raises ValueError for anything else.
    """
    try:
        (host_length,) = _LENGTH.unpack_from(value)
        start = _LENGTH.size + host_length
        (address_length,) = _LENGTH.unpack_from(value, start)
        start += _LENGTH.size
        numbers = value[start + address_length :]
        end = sockets.parse_address(value[start : start + address_length])
        return Listener(end, tuple(number for (number,) in _SEQUENCE_NUMBER.iter_unpack(numbers)))
    except (struct.error, ValueError) as error:
        raise ValueError(f"not an address of gloo as torch 2.13 writes it: {value[:64]!r}...") from error


def introduce(listener: Listener, rank: int) -> socket.socket:
    """Connect to our own gloo as if we were peer `rank`, without waiting; the caller closes the socket."""
    family = socket.AF_INET6 if ":" in listener.end[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(0.05)  # our own kernel answers at once, unless its queue is full
        sock.connect(listener.end)
        sock.send(_SEQUENCE_NUMBER.pack(listener.sequence_numbers[rank]))
    except OSError:
        sock.close()
        raise
    return sock


def init_process_group(store: Store, plan: Plan, timeout_s: float, backend: str) -> None:
    """Make the default process group; may block for long, and end in an exception when its sockets are cut.

    NCCL's part of it is made, but not connected.
    """
    c10d._world.group_count = 0
    hook = sys.excepthook
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=plan.rank,
            world_size=plan.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    finally:
        sys.excepthook = hook  # each init wraps it once more


def nccl_of(process_group: dist.ProcessGroup) -> Any:
    """NCCL's part of a group that has one."""
    return process_group._get_backend(torch.device("cuda"))


def forget_groups() -> list[object]:
    """Make torch forget every process group, without destroying any: the caller holds the last references."""
    world = c10d._world
    groups: list[object] = list(world.pg_map)
    c10d._update_default_pg(None)
    for facts in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag):
        facts.clear()
    world.tags_to_pg.clear()
    world.pg_coalesce_state.clear()
    _unregister_all_process_groups()
    world.group_count = 0
    return groups


def fail(future: torch.futures.Future[Any], make_error: Callable[[], Exception]) -> None:
    """Complete a future so that whoever waits for it in Python gets an exception of its own, and C++ an error.

    The public set_exception stores one exception in the future: raising it ties the waiter's frames to it, and the
    future among their variables, in a cycle through C++ that is never freed, tensors included.
    """

    def unwrap(_value: object) -> None:
        raise make_error()

    future._set_unwrap_func(unwrap)
    future.set_result(_FAILED)


def prefer_interface_of(address: str) -> None:
    """Have gloo and NCCL use the interface with this address, unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is set.

    Without it gloo takes what the host's name resolves to, which need not be what peers were told, and NCCL the first
    that it finds.
    """
    name = _interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # =: this very name, not what begins like it


def _interface_of(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
