"""The agents' store: what torch asks is answered on the spot, everything else is really shared."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from stretto.rendezvous.ports import ReservedPort, address_towards, listening_socket, numeric_address
from stretto.rendezvous.store import ExitBarrier, GenerationStore, SharedStores
from stretto_proto.v1.types_pb2 import Generation, Member
from torch.distributed import (  # type: ignore[attr-defined]  # torch exports TCPStore at run time only
    DistStoreError,
    TCPStore,
)
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, WorkerSpec
from torch.distributed.elastic.utils.store import barrier


class Node:
    """One of several nodes whose stores are compared."""

    def __init__(self, node_id: str, slots: int = 1) -> None:
        self.shared = SharedStores("job", "127.0.0.1")
        self.node_id, self.slots = node_id, slots
        self.said_succeeded = 0
        self.released = True

    def _succeed(self) -> None:
        self.said_succeeded += 1

    def store(self, generation: Generation) -> GenerationStore:
        member = next(m for m in generation.members if m.node_id == self.node_id)
        exit_barrier = ExitBarrier(self._succeed, lambda timeout_s: self.released)
        return GenerationStore(generation, member, exit_barrier, lambda: self.shared.open(generation, member))


def generation_of(nodes: list[Node], number: int = 1) -> Generation:
    members, first_rank = [], 0
    for rank, node in enumerate(nodes):
        members.append(
            Member(
                node_id=node.node_id,
                node_rank=rank,
                slots=node.slots,
                first_rank=first_rank,
                address="127.0.0.1",
                store_port=node.shared.port,
            )
        )
        first_rank += node.slots
    return Generation(number=number, members=members, world_size=first_rank)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    nodes = [Node("n0"), Node("n1", slots=2), Node("n2", slots=3)]
    nodes[0].shared.serve()
    yield nodes
    for node in nodes:
        node.shared.close()


class _Agent(SimpleElasticAgent):
    """Only to reach torch's own rank assignment."""

    def __init__(self) -> None:
        pass

    def _start_workers(self, *args: object) -> dict[int, object]:
        raise AssertionError

    _stop_workers = _monitor_workers = _shutdown = _start_workers  # type: ignore[assignment]  # never called


def ranks_by_torch(store: Store, group_rank: int, nodes: list[Node]) -> list[tuple[int, int, int, int, int]]:
    spec = WorkerSpec(
        role="trainer",
        local_world_size=nodes[group_rank].slots,
        rdzv_handler=None,  # type: ignore[arg-type]  # not used there
        entrypoint="x",
    )
    workers = _Agent()._assign_worker_ranks(store, group_rank, len(nodes), spec)
    return [(w.local_rank, w.global_rank, w.world_size, w.role_rank, w.role_world_size) for w in workers]


def test_torch_computes_the_right_ranks_for_unequal_slots_in_any_order(nodes: list[Node]) -> None:
    generation = generation_of(nodes)
    # Node rank 0 last: with torch's own store, the others would wait for it.
    assert ranks_by_torch(nodes[2].store(generation), 2, nodes) == [
        (0, 3, 6, 3, 6),
        (1, 4, 6, 4, 6),
        (2, 5, 6, 5, 6),
    ]
    assert ranks_by_torch(nodes[1].store(generation), 1, nodes) == [(0, 1, 6, 1, 6), (1, 2, 6, 2, 6)]
    assert ranks_by_torch(nodes[0].store(generation), 0, nodes) == [(0, 0, 6, 0, 6)]


def test_ranks_need_no_other_node(nodes: list[Node]) -> None:
    generation = generation_of(nodes)
    nodes[0].shared.close()
    assert ranks_by_torch(nodes[1].store(generation), 1, nodes) == [(0, 1, 6, 1, 6), (1, 2, 6, 2, 6)]


def test_an_agent_with_other_slots_than_it_joined_with_is_told_so(nodes: list[Node]) -> None:
    store = nodes[1].store(generation_of(nodes))
    info = json.dumps({"role": "trainer", "rank": 1, "local_world_size": 4}).encode()
    with pytest.raises(RuntimeError, match="joined with 2 worker processes, but torch's agent starts 4"):
        store.set("torchelastic/role_info/1", info)


def test_the_exit_barrier_says_succeeded_once_and_returns_when_released(nodes: list[Node]) -> None:
    store = nodes[1].store(generation_of(nodes))
    barrier(store, 3, "torchelastic/agent/terminal_state", barrier_timeout=7)
    assert nodes[1].said_succeeded == 1


def test_the_exit_barrier_times_out_as_torch_expects_it(nodes: list[Node]) -> None:
    nodes[1].released = False
    store = nodes[1].store(generation_of(nodes))
    with pytest.raises(DistStoreError, match="not all nodes of generation 1 ended within 7 s"):
        barrier(store, 3, "torchelastic/agent/terminal_state", barrier_timeout=7)


def test_other_keys_are_shared_between_the_nodes(nodes: list[Node]) -> None:
    generation = generation_of(nodes)
    first, second = nodes[0].store(generation), nodes[1].store(generation)
    second.set("colour", "blue")
    assert first.get("colour") == b"blue"
    assert [first.add("count", 2), second.add("count", 3)] == [2, 5]
    first.multi_set(["a", "b"], ["1", "2"])
    assert second.multi_get(["b", "a"]) == [b"2", b"1"]
    assert second.compare_set("colour", "blue", "red") == b"red"
    second.append("colour", "dish")
    assert first.get("colour") == b"reddish"
    assert first.check(["a", "b"])
    first.wait(["a"], timedelta(seconds=5))
    keys = first.num_keys()
    assert second.delete_key("a")
    assert not first.check(["a"])
    assert first.num_keys() == keys - 1


def test_a_wait_for_a_key_that_nobody_sets_ends_with_the_stores_timeout(nodes: list[Node]) -> None:
    store = nodes[1].store(generation_of(nodes))
    store.set_timeout(timedelta(milliseconds=50))
    assert store.timeout == timedelta(milliseconds=50)
    with pytest.raises(DistStoreError):
        store.wait(["never"])


def test_each_generation_begins_empty(nodes: list[Node]) -> None:
    old = nodes[1].store(generation_of(nodes, number=1))
    old.set("colour", "blue")
    new = nodes[1].store(generation_of(nodes, number=2))
    assert not new.check(["colour"])
    assert old.get("colour") == b"blue"


def test_torch_can_wrap_the_store_in_its_own(nodes: list[Node]) -> None:
    # A wrapper keeps only the C++ half of a store alive; torch's agent holds the whole.
    store = nodes[1].store(generation_of(nodes))
    wrapped = PrefixStore("mine", store)
    wrapped.set("colour", "blue")
    assert wrapped.get("colour") == b"blue"
    assert wrapped.add("count", 4) == 4
    assert wrapped.num_keys() > 0
    assert wrapped.delete_key("colour")


def test_the_leader_may_start_to_serve_after_others_have_connected() -> None:
    early, leader = Node("early"), Node("leader")
    generation = generation_of([leader, early])
    probe = socket.create_connection(("127.0.0.1", leader.shared.port))
    leader.store(generation).set("colour", "blue")
    assert early.store(generation).get("colour") == b"blue"
    probe.close()
    for node in (early, leader):
        node.shared.close()


def test_the_shared_store_listens_on_the_nodes_address_only() -> None:
    with listening_socket("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_address_of_another_machine_is_not_fatal() -> None:
    # 192.0.2.0/24 is reserved for documentation: no machine has it.
    with listening_socket("192.0.2.1") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("use_libuv", [True, False])
def test_torch_binds_a_reserved_port_that_nobody_else_is_given(use_libuv: bool) -> None:
    reserved = [ReservedPort() for _ in range(50)]
    assert len({r.port for r in reserved}) == 50
    port = reserved[0].port
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, use_libuv=use_libuv, timeout=timedelta(seconds=5)
    )
    store.set("colour", "blue")
    client = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
    assert client.get("colour") == b"blue"
    for r in reserved:
        r.close()
    client.set("colour", "red")
    assert store.get("colour") == b"red"


def test_the_address_is_the_one_on_the_way_to_the_controller() -> None:
    assert address_towards("127.0.0.1:29400") == "127.0.0.1"
    assert address_towards("[::1]:29400") in ("::1", socket.getfqdn())
    assert address_towards("no-such-host.invalid:29400") == socket.getfqdn()


def found_as(*numbers: str) -> Callable[..., list[tuple[object, ...]]]:
    """A resolver that finds these."""
    return lambda *args, **kwargs: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 0)) for number in numbers]


def test_a_name_becomes_the_address_that_this_machine_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numeric_address("10.0.0.7") == "10.0.0.7"
    assert numeric_address("[::1]") == "::1"
    assert numeric_address("localhost") in ("127.0.0.1", "::1")
    # As on Debian, where /etc/hosts gives a machine's own name a loopback address.
    monkeypatch.setattr(socket, "getaddrinfo", found_as("127.0.1.1", "10.0.0.7", "10.0.0.8"))
    assert numeric_address("trainer-3") == "10.0.0.7"


def test_an_address_that_cannot_be_resolved_is_named_with_the_option_to_give() -> None:
    with pytest.raises(ValueError, match=r"address no-such-host.invalid cannot be resolved .*; give .* --local-addr"):
        numeric_address("no-such-host.invalid")
