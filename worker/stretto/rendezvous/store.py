"""The store that torch's agent gets with each generation.

What the agent itself asks (ranks, the exit barrier) is answered from the controller's assignment, with no other
node in the way: the death of one must not hang another's agent. Everything else goes to a store that the nodes
of the generation really share, served by the agent of node rank 0 and opened when it is first used.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from stretto_proto.v1.types_pb2 import Generation, Member
from torch.distributed import (  # type: ignore[attr-defined]  # torch exports TCPStore at run time only
    DistStoreError,
    TCPStore,
)
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.agent.server.api import _RoleInstanceInfo

from stretto.rendezvous.ports import listening_socket

_ROLE_INFO = "torchelastic/role_info/"
_ASSIGNED_RANKS = "torchelastic/assigned_ranks/"
_EXIT_BARRIER = "torchelastic/agent/terminal_state"
# torch's own default for stores.
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class ExitBarrier:
    """How a node's agent says that its workers ended well, and waits until nobody needs it any more."""

    succeed: Callable[[], None]
    # Takes seconds; False when nobody released this node within them.
    wait: Callable[[float], bool]


class GenerationStore(Store):
    """One generation's store, as one node sees it. Fresh and empty each time."""

    def __init__(
        self, generation: Generation, member: Member, barrier: ExitBarrier, open_shared: Callable[[], Store]
    ) -> None:
        """open_shared: connects to the store that the nodes share; called at most once, when it is needed."""
        super().__init__()
        self._generation = generation
        self._member = member
        self._barrier = barrier
        self._open_shared = open_shared
        self._opened: Store | None = None
        self._role = "default"
        self._timeout = _TIMEOUT

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        if self._opened is not None:
            self._opened.set_timeout(timeout)

    def set(self, key: str, value: str | bytes) -> None:
        if key.startswith(_ROLE_INFO):
            self._check_role_info(value if isinstance(value, bytes) else value.encode())
        elif not _is_local(key):
            self._shared.set(key, value)  # type: ignore[arg-type]  # torch's stub knows str only; bytes work

    def get(self, key: str) -> bytes:
        if key.startswith(_ROLE_INFO):
            return self._role_info(int(key.removeprefix(_ROLE_INFO)))
        if key.startswith(_ASSIGNED_RANKS):
            return self._assigned_ranks(int(key.removeprefix(_ASSIGNED_RANKS)))
        return self._shared.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys] if any(map(_is_local, keys)) else self._shared.multi_get(keys)

    def multi_set(self, keys: list[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, value: int) -> int:
        if key.startswith(_EXIT_BARRIER):
            self._barrier.succeed()
            # How many have come is known to the controller alone; it releases the nodes.
            return 1
        return self._shared.add(key, value)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        limit = self._timeout if timeout is None else timeout
        shared = [key for key in keys if not _is_local(key)]
        if any(key.startswith(_EXIT_BARRIER) for key in keys) and not self._barrier.wait(limit.total_seconds()):
            raise DistStoreError(
                f"not all nodes of generation {self._generation.number} ended within {limit.total_seconds():g} s"
            )
        if shared:
            self._shared.wait(shared, limit)

    def check(self, keys: list[str]) -> bool:
        return self._shared.check(keys)

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        return self._shared.compare_set(key, expected_value, desired_value)

    def append(self, key: str, value: str | bytes) -> None:
        self._shared.append(key, value)  # type: ignore[attr-defined]  # missing in torch's stub

    def delete_key(self, key: str) -> bool:
        return self._shared.delete_key(key)

    def num_keys(self) -> int:
        return self._shared.num_keys()

    def has_extended_api(self) -> bool:
        return True

    # What torch's C++ calls them, where this store is wrapped in another.
    deleteKey = delete_key
    getNumKeys = num_keys

    @property
    def _shared(self) -> Store:
        if self._opened is None:
            self._opened = self._open_shared()
            self._opened.set_timeout(self._timeout)
        return self._opened

    def _check_role_info(self, value: bytes) -> None:
        info = _RoleInstanceInfo.deserialize(value)
        if info.local_world_size != self._member.slots:
            raise RuntimeError(
                f"this node joined with {self._member.slots} worker processes, but torch's agent starts "
                f"{info.local_world_size}: ranks would be wrong; give --rdzv-conf=slots={info.local_world_size}"
            )
        self._role = info.role

    def _role_info(self, node_rank: int) -> bytes:
        """What the agent of node rank 0 reads of each node, to compute ranks that this store then ignores.

        The controller knows no roles (a job has one), and this node does not know the others' slots.
        """
        return bytes(_RoleInstanceInfo(self._role, node_rank, self._member.slots).serialize())

    def _assigned_ranks(self, node_rank: int) -> bytes:
        """First rank and world size, globally and within the (one) role."""
        assert node_rank == self._member.node_rank, "torch's agents read their own ranks only"
        place = [self._member.first_rank, self._generation.world_size]
        return json.dumps(place + place).encode()


def _is_local(key: str) -> bool:
    return key.startswith((_ROLE_INFO, _ASSIGNED_RANKS, _EXIT_BARRIER))


class SharedStores:
    """The stores that the nodes of a job really share: one prefix for each generation, served by its node rank 0."""

    def __init__(self, job: str, address: str) -> None:
        self._job = job
        # Only bound and listening until this node leads: whoever connects before waits in the kernel's queue.
        self._listener: socket.socket | None = listening_socket(address)
        host, self.port = self._listener.getsockname()[:2]
        self._host = "localhost" if host in ("::", "0.0.0.0") else host
        self._server: TCPStore | None = None

    def serve(self) -> None:
        """This node leads: answer whoever connects. The same server serves every generation that it leads."""
        if self._listener is not None:
            descriptor, self._listener = self._listener.detach(), None
            self._server = TCPStore(
                self._host,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=descriptor,
                use_libuv=True,
            )

    def open(self, generation: Generation, member: Member) -> Store:
        """The store of `generation`, for this node, which is `member` there."""
        leader = generation.members[0]
        prefix = f"stretto/{self._job}/{leader.node_id}/{generation.number}"
        if member.node_rank == 0:
            self.serve()
            assert self._server is not None
            return PrefixStore(prefix, self._server)
        store = TCPStore(leader.address, leader.store_port, is_master=False, wait_for_workers=False)
        return PrefixStore(prefix, store)

    def close(self) -> None:
        """Stop listening, and serving."""
        if self._listener is not None:
            self._listener.close()
        self._listener = self._server = None
