"""What the group package knows of torch's and gloo's private parts, pinned: a torch that changed them fails here first.

If one of these fails after an upgrade of torch, read worker/stretto/group/torch_private.py: the part that the test
names has moved. Until it is adapted, in-process reconfiguration must not be used with that torch; restart mode can.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from stretto.group import Group, GroupLife, Member, Plan, sockets, store, torch_private
from torch._C._distributed_c10d import HashStore, Store  # torch.distributed re-exports them without saying so
from torch.distributed import distributed_c10d as c10d


@pytest.fixture
def life() -> Iterator[GroupLife]:
    with mock.patch.dict(os.environ):  # a build rewrites RANK and others
        life = GroupLife("private", "127.0.0.1")
        yield life
        assert life.close(timeout_s=10.0)


def build(life: GroupLife, generation: int) -> Group:
    ports = life.serve()
    plan = Plan(generation, 0, (Member("127.0.0.1", ports.store, ports.preflight),))
    return life.build(plan, cancelled=lambda: False)


class RecordingStore(Store):
    """A store of one process, that remembers what gloo does with it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.published = threading.Event()

    def set(self, key: str, value: Any) -> None:
        self.calls.append(("set", key))
        self.values[key] = value
        self.published.set()

    def get(self, key: str) -> bytes:
        self.calls.append(("get", key))
        return self.values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.calls += [("wait", key) for key in keys]
        while any(key not in self.values for key in keys):
            time.sleep(0.001)

    def has_extended_api(self) -> bool:
        return False


def test_gloo_publishes_one_listener_and_then_waits_for_each_rank_under_keys_of_the_same_form() -> None:
    store = RecordingStore()
    gloo = dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=5))
    assert [key for call, key in store.calls if call == "set"] == ["0/0"]
    assert {call for call, _ in store.calls} <= {"set", "wait", "get"}
    listener = torch_private.parse_listener(store.values["0/0"])
    assert len(listener.sequence_numbers) == 1
    assert listener.end[1] > 0
    del gloo


def test_introducing_ourselves_as_a_peer_frees_an_init_that_waits_for_it() -> None:
    """Two ranks; the second never comes, but its address is such that ours waits for it to connect."""
    store = RecordingStore()
    ended = threading.Event()

    def init() -> None:
        with contextlib.suppress(RuntimeError):  # freed, it raises or returns a useless group
            dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=60))
        ended.set()

    threading.Thread(target=init, daemon=True).start()
    assert store.published.wait(10)
    own = store.values["0/0"]
    listener = torch_private.parse_listener(own)
    assert len(listener.sequence_numbers) == 2
    store.values["0/1"] = with_port(own, 65_535)  # of two, the one with the lower port listens

    def cut_until(limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while not ended.wait(0.015) and time.monotonic() < deadline_s:
            sockets.cut(sockets.find(lambda found: found.local == listener.end))
        return ended.is_set()

    assert not cut_until(0.3), "init does not wait for a peer that should connect to it: is the rescue still needed?"
    with torch_private.introduce(listener, 1):
        assert cut_until(10.0), "a connection that sends our number no longer stands in for a peer"


def with_port(value: bytes, port: int) -> bytes:
    changed = bytearray(value)
    host_length: int = struct.unpack_from("=Q", value)[0]
    struct.pack_into("!H", changed, 8 + host_length + 8 + 2, port)
    return bytes(changed)


def test_the_names_that_are_used_exist() -> None:
    world = c10d._world
    for name in ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag", "tags_to_pg"):
        assert isinstance(getattr(world, name), dict), name
    assert isinstance(world.pg_coalesce_state, dict)
    assert isinstance(world.group_count, int)
    assert callable(c10d._update_default_pg)


def test_destroy_process_group_clears_nothing_that_forget_groups_does_not(life: GroupLife) -> None:
    """Every attribute of torch's world that a group changes is as it was once the group is forgotten."""
    before = snapshot()
    group = build(life, 1)
    changed = {name for name, size in snapshot().items() if size != before[name]}
    assert {"pg_map", "pg_names", "pg_group_ranks", "default_pg"} <= changed
    group.abandon()
    assert snapshot() == before


def snapshot() -> dict[str, int]:
    world = c10d._world
    names = [name for name in dir(type(world)) if isinstance(getattr(type(world), name), property)]
    values = {name: getattr(world, name) for name in names if name != "pg_config_info"}
    return {
        name: len(value) if hasattr(value, "__len__") else int(value is not None and value != 0)
        for name, value in values.items()
    }


def test_a_raised_group_count_does_not_change_the_keys(life: GroupLife) -> None:
    c10d._world.group_count = 5  # as a failed init leaves it
    group = build(life, 1)
    assert c10d._world.pg_names[group.process_group] == "0"
    group.abandon()


def test_a_scripts_own_process_group_is_refused_and_left_alone(life: GroupLife) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="remove the script's own init_process_group"):
            build(life, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_building_while_a_generation_is_held_is_refused(life: GroupLife) -> None:
    group = build(life, 1)
    with pytest.raises(RuntimeError, match="generation 1 is still held"):
        build(life, 2)
    group.abandon()
    build(life, 2)


def test_the_excepthook_is_not_wrapped_again_by_each_generation(life: GroupLife) -> None:
    hook = sys.excepthook
    build(life, 1).abandon()
    assert sys.excepthook is hook


def test_a_failed_future_raises_what_it_was_given_wherever_it_is_waited_for() -> None:
    future: torch.futures.Future[int] = torch.futures.Future()
    chained = future.then(lambda done: done.value())
    future.set_exception(LookupError("broken"))  # type: ignore[arg-type]  # torch's annotation asks for the result's type
    with pytest.raises(LookupError, match="broken"):
        future.wait()
    with pytest.raises(RuntimeError, match="broken"):
        chained.wait()


def test_the_store_listens_on_its_address_alone() -> None:
    served = store.ServedStore("127.0.0.1", 5.0)
    client = store.LeaderStore(("127.0.0.1", served.port), "p", 1.5, 5.0).connect()
    client.set("key", "value")
    assert client.get("key") == b"value"
    with open("/proc/self/net/tcp6", encoding="ascii") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert f"{'0' * 32}:{served.port:04X}" not in listening  # [::] would be every interface


def test_anything_else_than_an_address_of_gloo_is_refused() -> None:
    for value in (b"", b"1", b"\x02" + b"\x00" * 7 + b"vm" + b"\xff" * 8, bytes(200)):
        with pytest.raises(ValueError, match="not an address of gloo"):
            torch_private.parse_listener(value)
