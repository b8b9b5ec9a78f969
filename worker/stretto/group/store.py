"""The stores of a generation: torch's group meets through one of them while it is formed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed re-exports them silently

from stretto.group.sockets import Endpoint
from stretto.group.torch_private import DUMP_KEY, NCCL_KEYS, Listener, parse_listener
from stretto.group.watch import Watch

_DEFAULT_WAIT = timedelta(seconds=300)  # of a caller that gives no timeout: torch's own default for stores
_WAIT_SLICE_S = 0.005


@dataclass(frozen=True)
class LeaderStore:
    """Where the leader of a generation serves a store, and the prefix of that generation's keys."""

    end: Endpoint
    prefix: str
    connect_timeout_s: float
    timeout_s: float

    def connect(self) -> Store:
        """A client of its own; blocks for up to `connect_timeout_s` when the leader is dead or frozen, then raises."""
        timeout = timedelta(seconds=self.connect_timeout_s)
        client = TCPStore(*self.end, is_master=False, wait_for_workers=False, timeout=timeout)
        client.set_timeout(timedelta(seconds=self.timeout_s))
        return PrefixStore(self.prefix, client)


class FormationStore(Store):
    """The store of one generation: what gloo and NCCL need travels by beacon, the rest through the leader's store.

    gloo publishes where it listens, and then waits for the peers' keys of the same form; in NCCL rank 0 publishes
    where the others meet it. `check` is called again and again meanwhile, and what it raises comes out of
    init_process_group, or of NCCL's first operation. Only a script's own new_group or store calls need the leader: the
    first of them connects.
    """

    def __init__(
        self,
        watch: Watch,
        publish: Callable[[str, bytes], None],
        check: Callable[[], None],
        leader: LeaderStore,
    ) -> None:
        super().__init__()
        self._watch = watch
        self._publish = publish
        self._check = check
        self._leader = leader
        self._lock = threading.Lock()  # guards the fields below; connecting to the leader happens under it too
        self._client: Store | None = None
        self._own: dict[str, tuple[bytes, Listener]] = {}  # gloo's
        self._own_nccl: dict[str, bytes] = {}
        self._peers: dict[str, Listener] = {}

    def check_with(self, check: Callable[[], None]) -> None:
        """Have later waits, those of a script's own groups, end when this raises."""
        self._check = check

    def own_listeners(self) -> list[Listener]:
        with self._lock:
            return [listener for _, listener in self._own.values()]

    def peer_listeners(self) -> list[Listener]:
        with self._lock:
            return list(self._peers.values())

    def set(self, key: str, value: Any) -> None:  # both send bytes, where torch's annotation says str
        if key == DUMP_KEY:
            return  # said by a group that is dying: it must not wait for a leader that may be dead
        if key.startswith(NCCL_KEYS):
            with self._lock:
                self._own_nccl[key] = value
            self._publish(key, value)
            return
        try:
            listener = parse_listener(value)
        except (TypeError, ValueError):
            self._through_leader().set(key, value)
            return
        with self._lock:
            self._own[key] = (value, listener)
        self._publish(key, value)

    def get(self, key: str) -> bytes:
        if not self._travels_by_beacon(key):
            return self._through_leader().get(key)
        self.wait([key])  # gloo has waited already; NCCL leaves it to this call
        with self._lock:
            if key in self._own:
                return self._own[key][0]
            if key in self._own_nccl:
                return self._own_nccl[key]
        value = self._watch.published(key)
        assert value is not None, "what was published stays"
        if not key.startswith(NCCL_KEYS):
            with self._lock:
                self._peers[key] = parse_listener(value)
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        others = [key for key in keys if not self._travels_by_beacon(key)]
        if others:
            leader = self._through_leader()
            leader.wait(others) if timeout is None else leader.wait(others, timeout)
        deadline_s = time.monotonic() + (timeout or _DEFAULT_WAIT).total_seconds()
        for key in keys:
            while key not in others and not self._known(key):
                self._check()
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"no member has published {key}")
                self._watch.wait(_WAIT_SLICE_S)

    def check(self, keys: list[str]) -> bool:
        others = [key for key in keys if not self._travels_by_beacon(key)]
        known = all(self._known(key) for key in keys if key not in others)
        return known and (not others or self._through_leader().check(others))

    def add(self, key: str, amount: int) -> int:
        return self._through_leader().add(key, amount)

    def delete_key(self, key: str) -> bool:
        return self._through_leader().delete_key(key)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._through_leader().compare_set(key, expected, desired)

    def num_keys(self) -> int:
        return self._through_leader().num_keys()

    def has_extended_api(self) -> bool:
        return False

    def _travels_by_beacon(self, key: str) -> bool:
        """Whether it is one of NCCL's, or like a key of our gloo but for the rank at its end."""
        if key.startswith(NCCL_KEYS):
            return True
        with self._lock:
            return any(own.rpartition("/")[0] == key.rpartition("/")[0] for own in self._own)

    def _known(self, key: str) -> bool:
        with self._lock:
            return key in self._own or key in self._own_nccl or self._watch.published(key) is not None

    def _through_leader(self) -> Store:
        with self._lock:
            if self._client is None:
                self._client = self._leader.connect()
            return self._client


class ServedStore:
    """A store in this process that listens on `address` alone, on a port of the system's choice."""

    def __init__(self, address: str, timeout_s: float) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=1024)
        self.port: int = listener.getsockname()[1]
        self._store = TCPStore(
            address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
