"""What is done about NCCL, without it: torch's headers say what it reads, a fake stands in for its part of a group."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from stretto.errors import Fatal
from stretto.group import (
    BuildFailed,
    Group,
    GroupBroken,
    GroupLife,
    GroupSettings,
    Member,
    Plan,
    Superseded,
    nccl,
    torch_private,
)
from stretto.group.beacon import Beacon
from stretto.group.store import FormationStore, LeaderStore
from torch._C._distributed_c10d import DebugLevel  # torch.distributed re-exports it silently
from torch.distributed import distributed_c10d as c10d

LIMIT_S = 10.0
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HEADERS = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"


def test_this_torch_reads_every_variable_that_is_set_and_means_the_same_by_it() -> None:
    header = (HEADERS / "ProcessGroupNCCL.hpp").read_text()
    for name in nccl._ENVIRONMENT:
        assert f'"{name}"' in header, name
    modes = re.search(r"enum ErrorHandlingMode \{([^}]*)\}", header)
    assert modes is not None
    assert "NoHandling = 0" in modes[1]


def test_this_torch_numbers_verdicts_as_we_do() -> None:
    found = re.search(r"enum class WorkResult[^{]*\{([^}]*)\}", (HEADERS / "Work.hpp").read_text())
    assert found is not None
    assert [line.strip() for line in found[1].split(",")][:3] == ["SUCCESS = 0", "TIMEOUT = 1", "COMM_ERROR = 2"]
    assert callable(vars(dist.Work)["get_future_result"])


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [(None, GPU, GPU), (None, CPU, None), ("nccl", GPU, GPU), ("gloo", GPU, None), ("gloo", CPU, None)],
)
def test_nccl_is_for_gpus_unless_someone_says_gloo(
    backend: str | None, device: torch.device, expected: torch.device | None
) -> None:
    assert nccl.device_for(backend, device) == expected


def test_other_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'mpi'; allowed in in-process mode: 'nccl', 'gloo'"):
        nccl.device_for("mpi", CPU)
    with pytest.raises(ValueError, match="the device is cpu: NCCL needs a GPU"):
        nccl.device_for("nccl", CPU)


@pytest.fixture
def environ() -> Iterator[None]:
    with mock.patch.dict(os.environ), mock.patch.object(dist, "is_nccl_available", return_value=True):
        yield


@pytest.mark.usefixtures("environ")
def test_what_torchrun_says_about_errors_is_overruled_and_what_a_user_says_about_connecting_is_not() -> None:
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    os.environ["TORCH_NCCL_USE_COMM_NONBLOCKING"] = "0"
    nccl.prepare(GPU, GroupSettings(formation_limit_s=7.2))
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["TORCH_NCCL_USE_COMM_NONBLOCKING"] == "0"
    assert os.environ["TORCH_NCCL_NONBLOCKING_TIMEOUT"] == "8"  # whole seconds
    assert os.environ["NCCL_RUNTIME_CONNECT"] == "0"
    del os.environ["TORCH_NCCL_USE_COMM_NONBLOCKING"]
    nccl.prepare(GPU, GroupSettings())
    assert os.environ["TORCH_NCCL_USE_COMM_NONBLOCKING"] == "1"


@pytest.mark.usefixtures("environ")
def test_nccl_is_refused_where_it_cannot_work() -> None:
    for device in (CPU, torch.device("cuda")):
        with pytest.raises(ValueError, match="NCCL needs a GPU with its number"):
            nccl.prepare(device, GroupSettings())
    with (
        mock.patch.object(nccl, "get_debug_level", return_value=DebugLevel.DETAIL),
        pytest.raises(ValueError, match="TORCH_DISTRIBUTED_DEBUG=DETAIL"),
    ):
        nccl.prepare(GPU, GroupSettings())
    with (
        mock.patch.object(dist, "is_nccl_available", return_value=False),
        pytest.raises(ValueError, match="built without NCCL"),
    ):
        nccl.prepare(GPU, GroupSettings())


# -- where the members of NCCL tell each other how to meet
# ------------------------------------------------------------------------------------------------------------------


class Stores:
    """The stores of two members of generation 3, in one process; the leader's store is out of reach."""

    def __init__(self) -> None:
        self.beacons = [Beacon("job", "127.0.0.1") for _ in range(2)]
        self.checks: list[Callable[[], None]] = [lambda: None, lambda: None]
        self.stores = []
        for rank, beacon in enumerate(self.beacons):
            beacon.announce(3)
            watch = beacon.watch(3, {1 - rank: ("127.0.0.1", self.beacons[1 - rank].port)})
            self.stores.append(
                FormationStore(
                    watch,
                    lambda key, value, beacon=beacon: beacon.publish(3, key, value),  # type: ignore[misc]  # mypy cannot infer a lambda's default
                    check=lambda rank=rank: self.checks[rank](),  # type: ignore[misc]
                    leader=LeaderStore(("127.0.0.1", 1), "none", 0.1, 0.1),
                )
            )


@pytest.fixture
def stores() -> Iterator[Stores]:
    stores = Stores()
    yield stores
    for beacon in stores.beacons:
        beacon.close()


def test_the_default_groups_keys_for_cuda_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's on the CPU differ from NCCL's by the name of the device alone."""
    keys: list[str] = []
    monkeypatch.setattr(Beacon, "publish", lambda beacon, generation, key, value: keys.append(key))
    with mock.patch.dict(os.environ):
        life = GroupLife("keys", "127.0.0.1")
        build(life, 1)
        assert life.close(LIMIT_S)
    assert keys == ["0//cpu//0/0"]
    assert torch_private.NCCL_KEYS == "0//cuda//"


def test_who_asks_for_a_key_of_nccl_waits_for_it_and_no_store_of_a_leader_is_needed(stores: Stores) -> None:
    first, second = stores.stores
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(second.get("0//cuda//0")))
    asking.start()
    first.set("0//cuda//0", bytes(range(128)))
    asking.join(LIMIT_S)
    assert answers == [bytes(range(128))]
    assert first.get("0//cuda//0") == bytes(range(128))
    first.set(torch_private.DUMP_KEY, b"\0\0\0\0")  # would raise if it went to the leader


def test_a_generation_that_is_given_up_ends_the_wait_for_a_key_of_nccl(stores: Stores) -> None:
    caught: list[Exception] = []
    given_up = threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise Superseded("a newer assignment exists")

    def ask() -> None:
        try:
            stores.stores[1].get("0//cuda//0")
        except Superseded as error:
            caught.append(error)

    stores.checks[1] = check
    asking = threading.Thread(target=ask)
    asking.start()
    given_up.set()
    asking.join(LIMIT_S)
    assert len(caught) == 1


def test_a_thread_that_was_left_behind_publishes_nothing_to_the_next_generation(stores: Stores) -> None:
    stores.beacons[0].announce(4)
    stores.stores[0].set("0//cuda//0", b"of generation 3")
    watch = stores.beacons[1].watch(4, {0: ("127.0.0.1", stores.beacons[0].port)})
    while watch.numbers() != {0: 4}:
        watch.wait(LIMIT_S)
    assert watch.published("0//cuda//0") is None


# -- groups whose part for CUDA is a fake
# ------------------------------------------------------------------------------------------------------------------


class FakeNccl:
    """NCCL's part of a group. `release` is what an operation of its waits for; an abort ends the wait."""

    def __init__(self) -> None:
        self.aborts: list[str] = []
        self.aborted = threading.Event()
        self.abort_error: Exception | None = None
        self.meets: Callable[[], float] = lambda: 1.0

    def abort(self) -> None:
        self.aborts.append(threading.current_thread().name)
        self.aborted.set()
        if self.abort_error is not None:
            raise self.abort_error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    fake = FakeNccl()
    monkeypatch.setattr(torch_private, "GLOO_AND_NCCL", "gloo")
    monkeypatch.setattr(torch_private, "nccl_of", lambda group: fake)
    monkeypatch.setattr(nccl, "count_members", lambda backend, device: fake.meets())
    return fake


@pytest.fixture
def life(environ: None, fake: FakeNccl) -> Iterator[GroupLife]:
    life = GroupLife("nccl", "127.0.0.1", settings=GroupSettings(linger_s=0.01), nccl_device=GPU)
    yield life
    assert life.close(LIMIT_S)


def build(life: GroupLife, generation: int, cancelled: Callable[[], bool] = lambda: False) -> Group:
    ports = life.serve()
    plan = Plan(generation, 0, (Member("127.0.0.1", ports.store, ports.preflight),))
    return life.build(plan, cancelled=cancelled)


def test_tensors_on_the_host_stay_on_gloo(life: GroupLife) -> None:
    group = build(life, 1)
    assert group.nccl_device == GPU
    assert group.wait(group.all_reduce(torch.ones(2))).tolist() == [1.0, 1.0]
    assert group.wait(group.barrier()) is None


def test_a_cut_aborts_nccl_in_a_thread_of_its_own_once(life: GroupLife, fake: FakeNccl) -> None:
    group = build(life, 1)
    group.cut("first")
    group.cut("second")
    assert fake.aborted.wait(LIMIT_S)
    group.abandon()
    assert life._reaper.wait(LIMIT_S)
    assert fake.aborts == ["stretto-reaper"]


def test_a_generation_that_is_left_as_agreed_aborts_nccl_too(life: GroupLife, fake: FakeNccl) -> None:
    build(life, 1).abandon()
    group = build(life, 2)
    assert fake.aborted.wait(LIMIT_S)
    assert group.wait(group.all_reduce(torch.ones(1))).tolist() == [1.0]


def test_an_abort_that_fails_changes_nothing(life: GroupLife, fake: FakeNccl) -> None:
    fake.abort_error = RuntimeError("Future for ProcessGroup abort timed out after 30000 ms")
    build(life, 1).abandon()
    build(life, 2)


def test_a_meeting_that_never_ends_holds_nobody_once_a_newer_assignment_exists(life: GroupLife, fake: FakeNccl) -> None:
    begun = threading.Event()

    def meets() -> float:
        begun.set()
        assert fake.aborted.wait(LIMIT_S)
        raise RuntimeError("NCCL communicator was aborted on rank 0")

    fake.meets = meets
    with pytest.raises(Superseded, match="a newer assignment exists"):
        build(life, 1, cancelled=begun.is_set)
    assert fake.aborted.wait(LIMIT_S)
    assert not dist.is_initialized()
    fake.meets = lambda: 1.0
    build(life, 2)


def test_a_meeting_that_fails_fails_the_build(life: GroupLife, fake: FakeNccl) -> None:
    fake.meets = lambda: 3.0
    with pytest.raises(BuildFailed, match="NCCL counted 3 members where 1 were expected"):
        build(life, 1)
    assert fake.aborted.wait(LIMIT_S)


def test_two_workers_on_one_gpu_are_told_so_instead_of_trying_for_ever(life: GroupLife, fake: FakeNccl) -> None:
    def meets() -> float:
        raise dist.DistBackendError("NCCL error: ncclInvalidUsage: ... Duplicate GPU detected : rank 1 and rank 0")

    fake.meets = meets
    with pytest.raises(Fatal, match="NCCL refuses cuda:0: every worker needs a GPU of its own"):
        build(life, 1)
    assert c10d._world.pg_map == {}


def test_an_error_of_nccl_in_a_collective_of_torchs_own_cuts_the_group(life: GroupLife, fake: FakeNccl) -> None:
    group = build(life, 1)
    with pytest.raises(GroupBroken, match="NCCL failed: remote process exited"), group.guarded():
        raise dist.DistBackendError("remote process exited")
    assert fake.aborted.wait(LIMIT_S)


def test_other_errors_are_the_scripts_own(life: GroupLife) -> None:
    group = build(life, 1)
    with pytest.raises(ValueError, match="mine"), group.guarded():
        raise ValueError("mine")
    assert group.broken is None


def test_a_group_without_nccl_takes_no_error_for_nccls(fake: FakeNccl) -> None:
    with mock.patch.dict(os.environ):
        life = GroupLife("gloo", "127.0.0.1")
        group: Any = build(life, 1)
        with pytest.raises(dist.DistBackendError), group.guarded():
            raise dist.DistBackendError("of some other group")
        assert life.close(LIMIT_S)
    assert fake.aborts == []
