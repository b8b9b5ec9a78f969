"""Checkpoints: lossless, whole or absent, fenced, and never worse than the newest that verifies."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stretto import AdaScale
from stretto.checkpoint import Checkpointer, Fenced
from stretto.plain_tree import TreeEncoder, decode
from torch import Tensor, nn


def through_files(value: Any, folder: Path) -> Any:
    """Save a plain value and load it back."""
    checkpointer = Checkpointer(folder)
    checkpointer.save({"value": value}, step=1)
    state: dict[str, Any] = {"value": None}
    assert checkpointer.load_latest(state) is not None
    return state["value"]


def same(a: Any, b: Any) -> bool:
    """Equality that sees types, NaN, signs of zero, dtypes and shapes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, float):
        return repr(a) == repr(b)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=False))
    return bool(a == b)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5))
keys = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.sampled_from(["$tensor", "$dict", "$"]))
tensors = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3),
        torch.tensor(5),
        torch.empty(0, 3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([math.nan, -0.0]),
    ]
)
trees = st.recursive(
    st.one_of(scalars, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
def test_any_nested_value_comes_back_as_it_was(tree: Any) -> None:
    encoder = TreeEncoder()
    assert same(decode(encoder.encode(tree, "tree"), encoder.tensors), tree)


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
    }
    assert same(through_files(value, tmp_path), value)


def test_tied_sliced_and_strided_tensors_come_back_right(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    value = {"tied": [base, base], "slice": base[1:3, 2:], "flat": base.view(-1), "turned": base.t()}
    loaded = through_files(value, tmp_path)
    assert same({**loaded, "turned": loaded["turned"].contiguous()}, {**value, "turned": base.t().contiguous()})


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
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpointer.save({"value": value}, step=1)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def training_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(inner, [1, 3])
    ada = AdaScale(inner, model, base_batch_size=4, accumulation_steps=2, scheduler=scheduler)
    return {"model": model, "optimizer": ada, "note": {"seen": 0}}


def train(state: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state["optimizer"].zero_grad()
    for _ in range(2):
        state["model"](torch.randn(4, 3, generator=generator)).square().mean().div(2).backward()
    state["optimizer"].step()
    state["note"]["seen"] += 1


def test_training_continues_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    state, resumed = training_state(), training_state()
    for seed in range(4):
        train(state, seed)
    path = Checkpointer(tmp_path.as_uri()).save(state, step=4, generation=2)
    info = Checkpointer(str(tmp_path)).load_latest(resumed)
    assert info is not None
    assert (info.step, info.generation, info.path, info.passed_over) == (4, 2, path, ())
    for seed in range(4, 8):
        train(state, seed)
        train(resumed, seed)
    for name in ("model", "optimizer"):
        assert same(resumed[name].state_dict(), state[name].state_dict())
    assert resumed["note"] == {"seen": 8}
    assert getattr(resumed["model"].state_dict(), "_metadata", None)


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


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    for value in ("first", "second"):
        checkpointer.save({"x": value}, step=3)
    state = {"x": ""}
    checkpointer.load_latest(state)
    assert state["x"] == "second"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    paths = [checkpointer.save({"x": step}, step=step) for step in range(5)]
    assert [path.exists() for path in paths] == [False, False, False, True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", paths[3].name, paths[4].name]


def damage(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["remove", "truncate", "empty", "flip a bit"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(file: str, how: str, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    good, bad = (checkpointer.save({"x": step, "t": torch.ones(9)}, step=step) for step in (1, 2))
    assert checkpointer.verify(bad)
    damage(bad / file, how)
    verification = checkpointer.verify(bad)
    assert not verification
    assert file in verification.reason
    state: dict[str, Any] = {"x": None, "t": None}
    info = checkpointer.load_latest(state)
    assert info is not None
    assert (info.path, info.step, state["x"]) == (good, 1, 1)
    assert [(each.path, each.reason) for each in info.passed_over] == [(bad, verification.reason)]


def test_a_renamed_checkpoint_does_not_pass_for_another_step(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save({"x": 1}, step=1)
    moved = path.rename(str(path).replace("step-000000000001", "step-000000000009"))
    assert "step 1" in checkpointer.verify(moved).reason


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, keep=3)
    paths = [first.save({"x": step}, step=step) for step in range(3)]
    for path in paths[1:]:
        damage(path / "state.json", "truncate")
    second = Checkpointer(tmp_path, keep=2)  # a new process, which has verified nothing yet
    newest = second.save({"x": 3}, step=3)
    assert paths[0].exists()
    damage(newest / "state.json", "truncate")
    info = second.load_latest({"x": None})
    assert info is not None
    assert info.step == 0
    assert len(info.passed_over) == 3


def test_going_back_to_an_older_step_keeps_what_is_saved_there(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    damaged = checkpointer.save({"x": 100}, step=100)
    damage(damaged / "manifest.json", "truncate")
    saved = Checkpointer(tmp_path, keep=1).save({"x": 95}, step=95)
    assert saved.exists()
    info = checkpointer.load_latest({"x": None})
    assert info is not None
    assert info.step == 95


def test_nothing_whole_loads_nothing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    damage(checkpointer.save({"x": 1}, step=1) / "state.json", "remove")
    state = {"x": "as before"}
    assert checkpointer.load_latest(state) is None
    assert state == {"x": "as before"}


def test_a_checkpoint_without_what_is_asked_for_is_an_error(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({"model": 1}, step=1)
    with pytest.raises(ValueError, match="lacks optimizer; it holds model"):
        checkpointer.load_latest({"model": None, "optimizer": None})


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
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("fence")) == ["fence-0000000012"]
    assert path.exists()


class FenceWhileSaving:
    """An object whose state takes just long enough for a newer generation to begin."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def state_dict(self) -> dict[str, Any]:
        number = Raising(1.0)
        number.effect = lambda: self._checkpointer.fence(8)
        return {"weights": number}


class Raising(float):
    """A number that runs something when it is written."""

    effect: Callable[[], None]

    def __float__(self) -> float:
        self.effect()
        return 1.0


def test_a_fence_raised_while_a_save_is_written_stops_its_commit(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(Fenced):
        checkpointer.save({"model": FenceWhileSaving(checkpointer)}, step=1, generation=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "fence-0000000008"]


SAVER = """
import sys, torch
from stretto.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2)
state = {"x": 0, "tensors": {i: torch.zeros(2000) for i in range(20)}}
info = checkpointer.load_latest(state)
step = info.step if info else 0
print("loaded", step, flush=True)
while True:
    step += 1
    state["x"] = step
    for tensor in state["tensors"].values():
        tensor.fill_(step)
    checkpointer.save(state, step=step)
    print("saved", step, flush=True)
"""


def saved_until_killed(folder: Path, after_s: float) -> int:
    """Run a saving process, kill it so long after its first save, and return the last step it reported."""
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    timer = threading.Timer(after_s, process.send_signal, [signal.SIGKILL])
    timer.start()
    lines += process.stdout.readlines()
    assert process.wait(timeout=30) == -signal.SIGKILL
    timer.join()
    process.stdout.close()
    return int(lines[-1].split()[1])


def test_a_saver_killed_at_any_moment_leaves_its_last_checkpoint(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(5):
        reported = saved_until_killed(tmp_path, rng.uniform(0.0, 0.08))
        state: dict[str, Any] = {"x": None, "tensors": None}
        info = Checkpointer(tmp_path).load_latest(state)  # also clears what the killed one left
        assert info is not None
        assert reported <= info.step <= reported + 1
        assert info.passed_over == ()
        assert state["x"] == info.step
        assert all(bool((t == info.step).all()) for t in state["tensors"].values())
        assert not list(tmp_path.glob(".incomplete-*"))


def test_the_leftovers_of_a_live_writer_are_left_alone(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    temporary, claim = checkpointer._claim_temporary()
    Checkpointer(tmp_path)
    assert temporary.exists()
    os.close(claim)
    Checkpointer(tmp_path)
    assert not temporary.exists()


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket", "memory://x", "file://host/x"])
def test_other_places_are_refused_for_now(url: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: a local path or file:///path"):
        Checkpointer(url)


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="step is -1"):
        checkpointer.save({}, step=-1)
    with pytest.raises(ValueError, match="generation is 10000000000"):
        checkpointer.save({}, step=1, generation=10**10)
