"""Live groups with tensors on GPUs: gloo by way of the host, and NCCL.

`-m gpu` needs one GPU: NCCL with one process, gloo with up to three processes that share it. `-m gpus` needs three GPUs
and does the same with NCCL between the processes. Asked for where there are too few GPUs, they fail.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

import pytest
import torch
from gpu.cuda_trainee import NcclOn, gloo_main
from group.fleet import Entry, Fleet, Process
from stretto.group import GroupSettings
from transfer.test_adascale_on_group import check_case
from transfer.test_transfer_processes import answers, tell_all

SETTINGS = GroupSettings(operation_timeout_s=60.0)
RELEASE_LIMIT_S = 20.0  # milliseconds on a quiet machine; without the cut it is the operations' timeout

ALONE = [NcclOn(0)]
SHARED: list[Entry] = [gloo_main] * 3
OWN: list[Entry] = [NcclOn(index) for index in range(3)]
both = pytest.mark.parametrize(
    "entries",
    [
        pytest.param(SHARED, marks=pytest.mark.gpu, id="gloo"),
        pytest.param(OWN, marks=pytest.mark.gpus, id="nccl"),
    ],
)


@pytest.fixture(autouse=True)
def gpus(request: pytest.FixtureRequest) -> None:
    needed, there = 3 if request.node.get_closest_marker("gpus") else 1, torch.cuda.device_count()
    assert there >= needed, f"this test was asked for by its mark and needs {needed} GPUs; torch finds {there}"


def fleet_of(entries: Sequence[Entry], settings: GroupSettings = SETTINGS) -> Fleet:
    fleet = Fleet(0, settings)
    for entry in entries:
        fleet.add(entry)
    return fleet


def reduce_for_ever(members: Sequence[Process]) -> None:
    for member in members:
        member.tell("reduce", numel=500_000, in_flight=8, rounds=0)
    time.sleep(1.0)


def released(survivors: Sequence[Process], since_s: float) -> None:
    for survivor in survivors:
        assert survivor.expect("broken", timeout_s=90)["released_s"] - since_s < RELEASE_LIMIT_S


@pytest.mark.gpu
def test_one_worker_lives_through_generations_on_nccl() -> None:
    with fleet_of(ALONE) as fleet:
        for _ in range(3):
            fleet.form(fleet.processes)
            tell_all(fleet.processes, "train", steps=3, width=64, layers=3)
            assert answers(fleet.processes, "trained")[0]["done"] == 3
            fleet.leave(fleet.processes)
        first = fleet.figures()[0]
        for _ in range(5):
            fleet.form(fleet.processes)
            fleet.leave(fleet.processes)
        last = fleet.figures()[0]
        assert last["threads"] < first["threads"] + 5  # the newest generation's may be about to end
        assert last["firings"] == 0
        fleet.processes[0].tell("exit", timeout_s=30.0)
        assert fleet.processes[0].expect("exited")["clean"]


@pytest.mark.gpu
@pytest.mark.parametrize("entry", [NcclOn(0), gloo_main], ids=["nccl", "gloo"])
def test_a_cut_releases_who_waits_for_what_the_gpu_has_not_begun(entry: Entry) -> None:
    with fleet_of([entry]) as fleet:
        fleet.form(fleet.processes)
        waiting = fleet.processes[0]
        waiting.tell("busy")
        waiting.expect("begun")
        cut_s = time.monotonic()
        waiting.cut(fleet.generation, "the test says so")
        answer = waiting.expect("broken")
        assert answer["released_s"] - cut_s < RELEASE_LIMIT_S
        assert answer["done"] == 1, "it was released only when the GPU had caught up"
        fleet.leave(fleet.processes)
        fleet.form(fleet.processes)


@pytest.mark.gpu
def test_an_operation_of_nccl_that_takes_too_long_breaks_the_group() -> None:
    with fleet_of(ALONE, GroupSettings(operation_timeout_s=1.0)) as fleet:
        fleet.form(fleet.processes)
        fleet.processes[0].tell("busy")
        fleet.processes[0].expect("begun")
        reason = fleet.processes[0].expect("broken")["reason"]
        assert "has not ended on the GPU within 1 s" in reason or "NCCL reports a timeout" in reason


@pytest.mark.gpu
def test_two_workers_of_nccl_on_one_gpu_are_refused_in_words() -> None:
    with fleet_of([NcclOn(0), NcclOn(0)]) as fleet:
        fleet.begin(fleet.processes)
        told = [process.expect("refused", "failed", timeout_s=60) for process in fleet.processes]
        # One may see the other leave before its own NCCL has looked.
        assert any("every worker needs a GPU of its own" in answer["reason"] for answer in told), told


@both
def test_every_rank_gets_the_sum_in_one_generation_after_the_other(entries: Sequence[Entry]) -> None:
    with fleet_of(entries) as fleet:
        for members in (fleet.processes, fleet.processes[1:], fleet.processes):
            fleet.form(members)
            for member in members:
                member.tell("reduce", numel=100_000, in_flight=4, rounds=5)
            assert [answer["done"] for answer in answers(members, "reduced")] == [5] * len(members)
            fleet.leave(members)
        assert [each["firings"] for each in fleet.figures()] == [0, 0, 0]


@both
def test_a_killed_peer_releases_everyone(entries: Sequence[Entry]) -> None:
    with fleet_of(entries) as fleet:
        fleet.form(fleet.processes)
        reduce_for_ever(fleet.processes)
        killed_s = fleet.processes[0].kill()
        survivors = fleet.processes[1:]
        released(survivors, killed_s)
        fleet.leave(survivors)
        fleet.form(survivors)


@both
def test_a_frozen_peer_is_cut_off(entries: Sequence[Entry]) -> None:
    with fleet_of(entries) as fleet:
        fleet.form(fleet.processes)
        frozen, *survivors = fleet.processes
        reduce_for_ever(fleet.processes)
        frozen.signal(signal.SIGSTOP)
        time.sleep(0.5)
        cut_s = time.monotonic()
        for survivor in survivors:
            survivor.cut(fleet.generation, "rank 0 does not answer")
        released(survivors, cut_s)
        fleet.leave(survivors)
        fleet.form(survivors)
        fleet.leave(survivors)
        frozen.signal(signal.SIGCONT)
        frozen.expect("broken", timeout_s=90)
        fleet.leave([frozen])
        assert [each["firings"] for each in fleet.figures()] == [0, 0, 0]


@both
@pytest.mark.parametrize("case", ["backward", "step", "count_under_way", "second_micro_batch"])
def test_adascale_takes_a_step_that_was_cut_off_anew(entries: Sequence[Entry], case: str) -> None:
    check_case(case, entries)


@both
def test_state_arrives_bit_by_bit_on_gpu_and_host(entries: Sequence[Entry]) -> None:
    with fleet_of(entries) as fleet:
        fleet.form(fleet.processes)
        for source in range(3):
            for rank, member in enumerate(fleet.processes):
                member.tell("hold_mixed", seed=rank)
            prints = [answer["print"] for answer in answers(fleet.processes, "held")]
            tell_all(fleet.processes, "synchronise", source=source, chunk_bytes=1_000_000, in_flight=2)
            replies = answers(fleet.processes, "synchronised")
            assert [reply["print"] for reply in replies] == [prints[source]] * 3
            assert all(reply["untouched"] for reply in replies)
            receivers = [member for rank, member in enumerate(fleet.processes) if rank != source]
            tell_all(receivers, "compare_mixed", seed=source)
            assert all(reply["same"] and reply["tied"] for reply in answers(receivers, "compared"))


@both
def test_batch_norm_sees_the_samples_of_all_ranks(entries: Sequence[Entry]) -> None:
    with fleet_of(entries) as fleet:
        fleet.form(fleet.processes)
        tell_all(fleet.processes, "batch_norm")
        answers(fleet.processes, "begun")
        assert [answer["done"] for answer in answers(fleet.processes, "taken")] == [1, 1, 1]


@both
def test_a_cut_releases_who_waits_in_batch_norms_own_collective(entries: Sequence[Entry]) -> None:
    with fleet_of(entries) as fleet:
        fleet.form(fleet.processes)
        *waiting, _ = fleet.processes
        tell_all(waiting, "batch_norm")
        answers(waiting, "begun")
        time.sleep(1.0)
        cut_s = time.monotonic()
        for member in waiting:
            member.cut(fleet.generation, "rank 2 does not come")
        released(waiting, cut_s)
        fleet.leave(fleet.processes)
        fleet.form(fleet.processes)
