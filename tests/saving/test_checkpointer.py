"""Checkpoints on one rank: lossless, whole or absent, asynchronous, fenced, and kept as long as was said."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from saving.likeness import same
from saving.stores import Full, Held, Meddling, with_store
from saving.training import damage, train, training_state
from stretto.checkpoint import Checkpointer, CheckpointFailed, CheckpointSettings, Conflict, Failed, Fenced, Saved
from stretto.random_state import RandomState
from torch import nn

_NOBODY = 65534


def through_files(value: Any, folder: Path) -> Any:
    """Save a plain value and load it back."""
    checkpointer = Checkpointer(folder)
    checkpointer.save({"value": value}, step=1)
    state: dict[str, Any] = {"value": None}
    assert checkpointer.load_latest(state) is not None
    return state["value"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_values_that_json_cannot_say_survive_the_files(tmp_path: Path) -> None:
    value = {
        0: {"exp_avg": torch.randn(3), "step": torch.tensor(7.0)},
        "ints": {1: "a", -(2**80): "b"},
        (1, "x"): [math.inf, -math.inf, math.nan, -0.0, 1e-320],
        "sets": {1, 2},
        "frozen": frozenset({"a"}),
        "milestones": Counter({30: 1, 80: 2}),
        "dtype": torch.float16,
        "shape": torch.Size([2, 3]),
        "$tensor": "not one",
        "text": "ü\ud800\n",
        "empty": torch.empty(0, 3),
        "mixed": [torch.ones(3, dtype=torch.bool), torch.ones(5, dtype=torch.bfloat16), torch.tensor(2**60)],
    }
    assert same(through_files(value, tmp_path), value)


def test_tied_sliced_and_strided_tensors_come_back_right(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    value = {"tied": [base, base], "slice": base[1:3, 2:], "flat": base.view(-1), "turned": base.t()}
    loaded = through_files(value, tmp_path)
    assert same(loaded, {**value, "slice": base[1:3, 2:].contiguous(), "turned": base.t().contiguous()})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, r"state\['value'\]\['a'\]\[0\] is a object"),
        (lambda: None, r"state\['value'\] is a function"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_cannot_be_stored_is_named_with_its_place(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path).save({"value": value}, step=1)
    assert names(tmp_path) == []


def test_training_continues_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    state, resumed = training_state(), training_state(1)
    for seed in range(4):
        train(state, seed)
    path = Checkpointer(tmp_path.as_uri()).save(state, step=4, generation=2, tau=4.5)
    info = Checkpointer(str(tmp_path)).load_latest(resumed)
    assert info is not None
    assert (info.step, info.generation, info.tau, info.path, info.passed_over) == (4, 2, 4.5, path, ())
    for seed in range(4, 8):
        train(state, seed)
        train(resumed, seed)
    for name in ("model", "optimizer"):
        assert same(resumed[name].state_dict(), state[name].state_dict())
    assert resumed["note"] == {"seen": 8}
    assert getattr(resumed["model"].state_dict(), "_metadata", None)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"random": RandomState()}, step=1)
    drawn = torch.rand(3)
    torch.rand(100)
    checkpointer.load_latest({"random": RandomState()})
    assert torch.equal(torch.rand(3), drawn)


def test_what_is_saved_is_the_state_at_the_call_although_training_goes_on(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    weights = torch.zeros(1000)
    for step in range(1, 4):
        weights.fill_(step)
        assert checkpointer.begin({"weights": weights}, step=step)
        weights.fill_(-1.0)
        checkpointer.wait()
        outcome = checkpointer.poll()
        assert isinstance(outcome, Saved)
        assert (outcome.step, outcome.size_bytes > 4000) == (step, True)
        state: dict[str, Any] = {"weights": None}
        checkpointer.load_latest(state)
        assert torch.equal(state["weights"], torch.full((1000,), float(step)))


def test_an_empty_directory_has_nothing_to_load(tmp_path: Path) -> None:
    state = {"x": 1}
    assert Checkpointer(tmp_path / "new" / "one").load_latest(state) is None
    assert state == {"x": 1}


def test_the_highest_generation_then_the_highest_step_is_loaded(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=9)
    for generation, step in [(1, 50), (2, 10), (2, 9), (10, 1), (9, 99)]:
        checkpointer.save({"x": [generation, step]}, step=step, generation=generation)
    state: dict[str, Any] = {"x": None}
    info = checkpointer.load_latest(state)
    assert info is not None
    assert (info.generation, info.step, state["x"]) == (10, 1, [10, 1])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    paths = [Path(checkpointer.save({"x": step}, step=step)) for step in range(5)]
    assert names(tmp_path) == [paths[3].name, paths[4].name]


def test_milestones_of_tau_are_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1, keep_every_tau=10.0)
    for step in range(1, 36):
        checkpointer.save({"x": step}, step=step, tau=1.5 * step)
    kept = [int(name.split("-")[3]) for name in names(tmp_path)]
    assert kept == [7, 14, 20, 27, 34, 35], "the first at or after 10, 20, 30, 40, 50, and the newest"


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, keep=3)
    paths = [Path(first.save({"x": step}, step=step)) for step in range(3)]
    for path in paths[1:]:
        damage(path / "rank-00000.json", "truncate")
    second = Checkpointer(tmp_path, keep=2)  # a new process, which has verified nothing yet
    newest = Path(second.save({"x": 3}, step=3))
    assert paths[0].exists()
    damage(newest / "rank-00000.json", "truncate")
    info = second.load_latest({"x": None})
    assert info is not None
    assert info.step == 0
    assert len(info.passed_over) == 3


def test_a_process_that_has_read_nothing_reads_older_ones_before_it_lets_any_go(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, keep=9)
    paths = [Path(first.save({"x": torch.full((50,), float(step))}, step=step)) for step in range(4)]
    for path in paths[1:]:
        damage(next(path.glob("*.safetensors")), "flip a bit")  # their sizes are right
    second = Checkpointer(tmp_path, keep=3)
    for step in range(4, 6):
        newest = Path(second.save({"x": torch.full((50,), float(step))}, step=step))
        assert paths[0].exists(), "0, 4 and 5 are the only ones that are right"
    assert names(tmp_path)[-1] == newest.name
    second.save({"x": torch.full((50,), 6.0)}, step=6)
    assert [int(name.split("-")[3]) for name in names(tmp_path)] == [4, 5, 6]


def test_going_back_to_an_older_step_keeps_what_is_saved_there(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    damage(Path(checkpointer.save({"x": 100}, step=100)) / "manifest.json", "truncate")
    saved = Checkpointer(tmp_path, keep=1).save({"x": 95}, step=95)
    assert Path(saved).exists()
    info = checkpointer.load_latest({"x": None})
    assert info is not None
    assert info.step == 95


def test_a_checkpoint_without_what_is_asked_for_is_an_error(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": 1}, step=1)
    with pytest.raises(ValueError, match="lacks optimizer; it holds model"):
        checkpointer.load_latest({"model": None, "optimizer": None})


def test_all_that_differs_in_another_model_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))}, step=1)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False).double())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="another model") as raised:
        checkpointer.load_latest({"model": other})
    for line in (
        "model.0.weight: F32[5, 3] here, F32[4, 3] in the checkpoint",
        "model.1.weight: F64[2, 5] here, F32[2, 4] in the checkpoint",
        "model.1.bias: in the checkpoint only",
    ):
        assert line in str(raised.value)
    assert same(dict(other.state_dict()), before)


def test_a_fenced_generation_cannot_save_any_more(tmp_path: Path) -> None:
    old, new = Checkpointer(tmp_path), Checkpointer(tmp_path)
    path = old.save({"x": 1}, step=1, generation=3)
    new.fence(4)
    new.fence(4)
    with pytest.raises(Fenced, match=r"generation 3 may not save .* generation 4 has begun"):
        old.save({"x": 2}, step=2, generation=3)
    with pytest.raises(Fenced):
        old.fence(3)
    new.fence(12)
    new.save({"x": 3}, step=2, generation=12)
    assert [name for name in names(tmp_path) if name.startswith("fence")] == ["fence-0000000012"]
    assert Path(path).exists()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("file", [".safetensors", "manifest.json"])
def test_a_fence_raised_while_a_save_is_written_stops_its_commit(file: str, after: bool, tmp_path: Path) -> None:
    first = Checkpointer(tmp_path).save({"x": torch.ones(3)}, step=1, generation=7)
    newer = Checkpointer(tmp_path)
    old = with_store(Meddling(tmp_path, file, lambda: newer.fence(8), after=after))
    with pytest.raises(Fenced):
        old.save({"x": torch.zeros(3)}, step=2, generation=7)
    info = newer.load_latest({"x": None})
    assert info is not None
    assert info.path == first


def test_another_jobs_folder_is_refused(tmp_path: Path) -> None:
    Checkpointer(tmp_path, job="digits").save({"x": 1}, step=1)
    before = names(tmp_path)
    refused = pytest.raises(Conflict, match="holds the checkpoints of job digits, and this is job letters")
    with refused:
        Checkpointer(tmp_path, job="letters").save({"x": 2}, step=2)
    with refused:
        Checkpointer(tmp_path, job="letters").fence(3)
    assert names(tmp_path) == before


def test_a_damaged_claim_is_no_invitation(tmp_path: Path) -> None:
    Checkpointer(tmp_path, job="digits").save({"x": 1}, step=1)
    for spoiled in (b'{"job": "digits', b"\xff", b"[]"):
        (tmp_path / "job.json").write_bytes(spoiled)
        with pytest.raises(Conflict, match="job digits"):
            Checkpointer(tmp_path, job="letters").save({"x": 2}, step=2)
    Checkpointer(tmp_path, job="digits").save({"x": 2}, step=2)
    assert b"digits" in (tmp_path / "job.json").read_bytes()


def test_two_runs_in_one_folder_notice_each_other(tmp_path: Path) -> None:
    ours, theirs = Checkpointer(tmp_path), Checkpointer(tmp_path)
    ours.save({"x": 1}, step=1)
    theirs.save({"x": 2}, step=5)  # began when step 1 was there, so that belongs to its past
    with pytest.raises(Conflict, match="another run has saved"):
        ours.save({"x": 3}, step=2)
    info = theirs.load_latest({"x": None})
    assert info is not None
    assert info.step == 5


def test_failed_saves_are_warnings_until_there_are_too_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Full(tmp_path)
    checkpointer = with_store(store, settings=CheckpointSettings(failures_allowed=2))

    def attempt(step: int) -> Saved | Failed | None:
        assert checkpointer.begin({"x": torch.ones(3)}, step=step)
        checkpointer.wait()
        return checkpointer.poll()

    for step in (1, 2):
        outcome = attempt(step)
        assert isinstance(outcome, Failed)
        assert "no space left" in outcome.reason
    store.full = False
    assert isinstance(attempt(3), Saved)
    store.full = True
    attempt(4)
    attempt(5)
    with pytest.raises(CheckpointFailed, match=r"3 saves in a row have failed; the latest, of step 6: no space left"):
        attempt(6)
    assert "no checkpoint of step 4: no space left" in caplog.text
    assert len(names(tmp_path)) == 1, "what was written of the others is gone"


def test_a_device_that_takes_nothing_is_said_to_be_full(tmp_path: Path) -> None:
    """/dev/full takes nothing; that device in a share's place is as near as an ordinary user comes."""
    store = Meddling(tmp_path, ".safetensors", lambda: None)
    checkpointer = with_store(store)

    def redirect(path: str, chunks: Iterable[Any], direct: bool) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            for chunk in chunks:
                full.write(chunk)

    store._write_local = redirect  # type: ignore[method-assign]  # the one call that reaches the disk
    with pytest.raises(CheckpointFailed, match="no space left"):
        checkpointer.save({"x": torch.ones(3)}, step=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system that fills up takes the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_at_any_point_of_a_save_keeps_what_it_had(small_disk: Path) -> None:
    first = Checkpointer(small_disk, job="digits").save({"x": torch.ones(1000)}, step=1)
    filler, outcomes = small_disk / "filler", []
    for free in range(20):
        filler.write_bytes(b"")
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        filler.write_bytes(bytes(room - 4096 * free))
        checkpointer = Checkpointer(small_disk, job="digits", settings=CheckpointSettings(part_bytes=5000))
        checkpointer.begin({"x": torch.zeros(8000)}, step=2)
        checkpointer.wait()
        outcome = checkpointer.poll()
        if isinstance(outcome, Failed):
            assert "no space left" in outcome.reason, f"with {free} free pages"
            info = Checkpointer(small_disk).load_latest({"x": None})
            assert info is not None
            assert (info.path, info.passed_over) == (first, ())
        else:
            assert outcome is not None
            assert checkpointer.verify(outcome.path)
            shutil.rmtree(outcome.path)
        outcomes.append(type(outcome).__name__)
    assert set(outcomes) == {"Failed", "Saved"}
    assert outcomes == sorted(outcomes), "from some room on it fits"


def test_a_file_that_may_not_grow_is_said_to_be_limited(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    first = Checkpointer(tmp_path).save({"x": 1}, step=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(CheckpointFailed, match=r"raise its limit \(ulimit -f\)"):
            Checkpointer(tmp_path).save({"x": torch.ones(10_000)}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    info = Checkpointer(tmp_path).load_latest({"x": None})
    assert info is not None
    assert info.path == first


def _as_nobody(action: Callable[[], str]) -> str:
    """What the action says in a process without any rights; root, who may do everything, becomes somebody else."""
    sender: Connection
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()  # the action sees what this process has imported, in places that nobody else may read
    if not pid:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
            sender.send(action())
        finally:
            os._exit(0)
    assert receiver.poll(60)
    answer: str = receiver.recv()
    os.waitpid(pid, 0)
    return answer


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that everybody may enter and read; pytest's are their owner's."""
    folder = Path(tempfile.mkdtemp(prefix="stretto-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_without_permission_is_said_to_be(open_folder: Path) -> None:
    first = Checkpointer(open_folder).save({"x": torch.ones(3)}, step=1)
    for path in [open_folder, Path(first)]:
        path.chmod(0o555)

    def attempt() -> str:
        try:
            return Checkpointer(open_folder).save({"x": torch.zeros(3)}, step=2)
        except CheckpointFailed as error:
            return str(error)

    said = _as_nobody(attempt)
    assert "no checkpoint of step 2: no permission" in said
    assert "let this user write there" in said
    open_folder.chmod(0o755)
    assert names(open_folder) == [Path(first).name], "nothing was overwritten"
    assert Checkpointer(open_folder).verify(first)


def test_files_that_may_not_be_read_are_said_to_be(open_folder: Path) -> None:
    path = Path(Checkpointer(open_folder).save({"x": torch.ones(3)}, step=1))
    next(path.glob("*.safetensors")).chmod(0o000)

    def attempt() -> str:
        try:
            Checkpointer(open_folder).load_latest({"x": None})
        except CheckpointFailed as error:
            return str(error)
        return "loaded"

    assert "rank-00000-part-0000.safetensors cannot be read: no permission" in _as_nobody(attempt)


def test_a_place_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointFailed, match="no checkpoint of step 1"):
        Checkpointer(tmp_path / "file").save({"x": 1}, step=1)


def test_a_save_that_runs_is_not_started_twice(tmp_path: Path) -> None:
    store = Held(tmp_path)
    checkpointer = with_store(store)
    assert checkpointer.begin({"x": torch.ones(3)}, step=1)
    assert store.reached.wait(60)
    assert checkpointer.busy
    assert not checkpointer.begin({"x": torch.zeros(3)}, step=2)
    assert checkpointer.poll() is None
    assert not checkpointer.wait(0.0)
    store.go.set()
    checkpointer.wait()
    outcome = checkpointer.poll()
    assert isinstance(outcome, Saved)
    assert outcome.step == 1
    assert checkpointer.begin({"x": torch.zeros(3)}, step=2)
    checkpointer.wait()


def test_an_abandoned_save_leaves_nothing_and_disturbs_no_later_one(tmp_path: Path) -> None:
    store = Held(tmp_path)
    checkpointer = with_store(store)
    checkpointer.begin({"x": torch.ones(3)}, step=1)
    assert store.reached.wait(60)
    checkpointer.abandon()
    store.go.set()
    checkpointer.wait()
    assert checkpointer.poll() is None
    assert names(tmp_path) == []
    checkpointer.save({"x": torch.zeros(3)}, step=2)
    assert len(names(tmp_path)) == 1


def test_leftovers_go_with_the_next_checkpoint(tmp_path: Path) -> None:
    path = Path(Checkpointer(tmp_path).save({"x": torch.ones(3)}, step=1))
    (path / "manifest.json").unlink()  # as if the process had been killed before it was written
    Checkpointer(tmp_path).save({"x": 2}, step=2)
    assert len(names(tmp_path)) == 1


def test_the_buffer_is_used_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    addresses = set()
    for step in range(3):
        checkpointer.save({"x": torch.full((1000,), float(step))}, step=step)
        addresses.add(checkpointer._staging._buffer.data_ptr())
    assert len(addresses) == 1


def test_large_tensors_are_spread_over_files(tmp_path: Path) -> None:
    settings = CheckpointSettings(part_bytes=4096)
    state = {"x": torch.randn(100, 100), "y": torch.randn(7), "z": torch.randn(1, 5000)}
    path = Path(Checkpointer(tmp_path, settings=settings).save(state, step=1))
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) >= 15
    assert max(sizes) < 4096 + 1024
    loaded: dict[str, Any] = dict.fromkeys(state)
    Checkpointer(tmp_path).load_latest(loaded)
    assert same(loaded, state)


def test_files_are_safetensors_that_others_can_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = Path(Checkpointer(tmp_path).save({"x": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True)}, step=1))
    (file,) = path.glob("*.safetensors")
    assert same(load_file(file), {"x@0,0": torch.arange(6.0).reshape(2, 3), "b@": torch.tensor(True)})


def test_places_in_memory_work_as_folders_do() -> None:
    checkpointer = Checkpointer("memory://stretto-test/checkpoints", keep=2)
    for step in range(4):
        checkpointer.save({"x": torch.full((3,), float(step))}, step=step, generation=1, fences=True)
    state: dict[str, Any] = {"x": None}
    info = Checkpointer("memory://stretto-test/checkpoints").load_latest(state)
    assert info is not None
    assert (info.step, state["x"].tolist()) == (3, [3.0, 3.0, 3.0])
    assert len(checkpointer._catalogue.newest_first()) == 2
    checkpointer.fence(2)
    with pytest.raises(Fenced):
        checkpointer.save({"x": 1}, step=5, generation=1)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep_every_tau is -1"):
        Checkpointer(tmp_path, keep_every_tau=-1)
    with pytest.raises(ValueError, match="part_bytes is 0"):
        CheckpointSettings(part_bytes=0).validate()
    with pytest.raises(ValueError, match="no place that fsspec knows"):
        Checkpointer("nowhere://x")
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="step is -1"):
        checkpointer.save({}, step=-1)
    with pytest.raises(ValueError, match="generation is 10000000000"):
        checkpointer.save({}, step=1, generation=10**10)
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpointer.verify(tmp_path / "x")


def test_memory_that_was_prepared_is_what_the_first_save_uses(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    state = {"x": torch.arange(100_000.0), "y": torch.ones(7)}
    checkpointer.prepare(state)
    checkpointer._staging._await_memory()
    prepared = checkpointer._staging._buffer.data_ptr()
    checkpointer.prepare(state)
    checkpointer.save(state, step=1)
    assert checkpointer._staging._buffer.data_ptr() == prepared
    loaded: dict[str, Any] = dict.fromkeys(state)
    assert Checkpointer(tmp_path).load_latest(loaded) is not None
    assert same(loaded, state)
