"""Whatever happens to a checkpoint's files is noticed, and the one before is used."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from saving.ranks import on_ranks
from saving.stores import Meddling, with_store
from saving.training import WAYS, damage, train, training_state
from stretto.checkpoint import Checkpointer, CheckpointFailed, CheckpointSettings
from xxhash import xxh3_64_hexdigest

SETTINGS = CheckpointSettings(part_bytes=900)
FILES = sorted(
    ["manifest.json", *(f"rank-{rank:05d}.json" for rank in range(2))]
    + [f"rank-{rank:05d}-part-{part:04d}.safetensors" for rank in range(2) for part in range(2)]
)


def _save(state: dict[str, Any], step: int, rank: int, checkpointer: Checkpointer) -> str:
    return checkpointer.save(state, step=step)


def _save_two(folder: Path) -> tuple[Path, Path]:
    """Steps 1 and 2 of a training, each written by two ranks."""
    state = {**training_state(), "filler": torch.arange(400.0)}
    paths = []
    for step in (1, 2):
        train(state, step)
        (path, _) = on_ranks(2, folder, partial(_save, state, step), SETTINGS)
        paths.append(Path(path))
    assert sorted(file.name for file in paths[1].iterdir()) == FILES
    return paths[0], paths[1]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(file: str, how: str, tmp_path: Path) -> None:
    good, bad = _save_two(tmp_path)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.verify(bad)
    damage(bad / file, how)
    verification = checkpointer.verify(bad)
    assert not verification
    assert file in verification.reason
    state = training_state(1)
    info = checkpointer.load_latest(state)
    assert info is not None
    assert (info.path, info.step, state["note"]) == (str(good), 1, {"seen": 1})
    ((passed_over, reason),) = [(each.path, each.reason) for each in info.passed_over]
    assert passed_over == str(bad)
    assert file in reason


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path: Path) -> None:
    good, bad = _save_two(tmp_path)
    checkpointer = Checkpointer(tmp_path)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for file in FILES:
        whole = (bad / file).read_bytes()
        for how in ("flip a bit", "truncate"):
            for _ in range(8):
                damage(bad / file, how, rng.random())
                assert not checkpointer.verify(bad), f"{how} in {file}"
                info = checkpointer.load_latest(training_state())
                assert info is not None
                assert info.path == str(good), f"{how} in {file}"
                (bad / file).write_bytes(whole)
    assert checkpointer.verify(bad)


@pytest.mark.parametrize("file", FILES)
def test_ranks_agree_on_what_to_pass_over_though_each_checks_a_part(file: str, tmp_path: Path) -> None:
    good, bad = _save_two(tmp_path)
    damage(bad / file, "flip a bit")

    def load(rank: int, checkpointer: Checkpointer) -> str:
        info = checkpointer.load_latest(training_state())
        assert info is not None
        return info.path

    assert on_ranks(3, tmp_path, load) == [str(good)] * 3


def test_nothing_is_loaded_in_part(tmp_path: Path) -> None:
    path = Path(Checkpointer(tmp_path, settings=SETTINGS).save(training_state(), step=1))
    damage(max(path.glob("*.safetensors")), "flip a bit", at=0.99)
    state = training_state(1)
    before = {name: value.clone() for name, value in state["model"].state_dict().items()}
    with pytest.raises(CheckpointFailed, match=r"no checkpoint in .* is whole"):
        Checkpointer(tmp_path).load_latest(state)
    assert all(torch.equal(value, before[name]) for name, value in state["model"].state_dict().items())


def test_a_renamed_checkpoint_does_not_pass_for_another_step(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    path = Path(checkpointer.save({"x": 1}, step=1))
    moved = path.rename(str(path).replace("step-000000000001", "step-000000000009"))
    assert "step-000000000001" in checkpointer.verify(moved).reason


def _rewritten(path: Path, change: Any) -> None:
    """Change an index, and make the manifest agree with it, as somebody who means it would."""
    index, manifest = path / "rank-00000.json", path / "manifest.json"
    body = json.loads(index.read_bytes())
    change(body)
    data = json.dumps(body).encode()
    index.write_bytes(data)
    whole = json.loads(manifest.read_bytes())
    whole["files"][index.name] = {"size_bytes": len(data), "xxh3": xxh3_64_hexdigest(data)}
    del whole["xxh3"]
    whole["xxh3"] = xxh3_64_hexdigest(json.dumps(whole, sort_keys=True).encode())
    manifest.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["chunks"][0].update(offsets=[10**6]),
        lambda body: body["chunks"][0].update(sizes=[-1]),
        lambda body: body["chunks"][0].update(start=10**9),
        lambda body: body["chunks"][0].update(file="../../etc/passwd"),
        lambda body: body["chunks"].pop(),
        lambda body: body["tensors"]["x"].update(shape=[2**60]),
        lambda body: body["tensors"]["x"].update(dtype="pickle"),
        lambda body: body["tree"].update(x={"$tensor": "y"}),
        lambda body: body["tree"].update(x={"$object": "os.system"}),
        lambda body: body.update(tree=None),
        lambda body: body.update(chunks=3),
    ],
)
def test_a_crafted_index_is_refused_and_nothing_is_run(change: Any, tmp_path: Path) -> None:
    path = Path(Checkpointer(tmp_path).save({"x": torch.ones(5)}, step=1))
    _rewritten(path, change)
    state: dict[str, Any] = {"x": None}
    with pytest.raises(CheckpointFailed, match="is whole"):
        Checkpointer(tmp_path).load_latest(state)
    assert state == {"x": None}


def test_a_pickle_in_a_files_place_is_refused(tmp_path: Path) -> None:
    path = Path(Checkpointer(tmp_path).save({"x": torch.ones(5)}, step=1))
    torch.save({"x": torch.ones(5)}, path / "rank-00000-part-0000.safetensors")
    torch.save({"x": torch.ones(5)}, path / "rank-00000.json")
    with pytest.raises(CheckpointFailed, match="instead of"):
        Checkpointer(tmp_path).load_latest({"x": None})


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = Path(Checkpointer(tmp_path).save({"x": 1}, step=1))
    whole = json.loads((path / "manifest.json").read_bytes())
    del whole["xxh3"]
    whole["format_version"] = 3
    whole["xxh3"] = xxh3_64_hexdigest(json.dumps(whole, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(whole))
    assert "format version 3; this release reads 2" in Checkpointer(tmp_path).verify(path).reason


def test_what_the_disk_made_of_it_is_read_before_an_older_one_goes(tmp_path: Path) -> None:
    """A disk that says that it has written what it has not: the checkpoint before stays, the save fails."""
    first = Checkpointer(tmp_path, keep=1).save({"x": torch.ones(50)}, step=1)
    store = Meddling(tmp_path, ".safetensors", lambda: damage(_shares(tmp_path)[-1], "flip a bit"), after=True)
    checkpointer = with_store(store, keep=1)
    checkpointer.load_latest({"x": None})
    with pytest.raises(CheckpointFailed, match=r"no checkpoint of step 2: .*does not match its checksum"):
        checkpointer.save({"x": torch.zeros(50)}, step=2)
    info = Checkpointer(tmp_path).load_latest({"x": None})
    assert info is not None
    assert (info.path, info.passed_over) == (first, ())


def test_where_nothing_is_to_go_nothing_is_read_again(tmp_path: Path) -> None:
    store = Meddling(tmp_path, ".safetensors", lambda: damage(_shares(tmp_path)[-1], "flip a bit"), after=True)
    first = Checkpointer(tmp_path).save({"x": torch.ones(50)}, step=1)
    with_store(store).save({"x": torch.zeros(50)}, step=2)
    info = Checkpointer(tmp_path).load_latest({"x": None})
    assert info is not None
    assert (info.path, len(info.passed_over)) == (first, 1)


def _shares(folder: Path) -> list[Path]:
    return sorted(folder.glob("generation-*/*.safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(world_size=0),
        lambda body: body.update(world_size="two"),
        lambda body: body.update(world_size=10**12),
        lambda body: body.update(tau="high"),
        lambda body: body.update(job=None),
        lambda body: body.update(step=-1),
        lambda body: body.update(files={"../../etc/passwd": {"size_bytes": 1, "xxh3": ""}}),
        lambda body: body.update(files=[]),
        lambda body: body.update(more=1),
    ],
)
def test_a_crafted_manifest_is_refused(change: Any, tmp_path: Path) -> None:
    good = Checkpointer(tmp_path).save({"x": torch.ones(5)}, step=1)
    path = Path(Checkpointer(tmp_path).save({"x": torch.ones(5)}, step=2))
    body = json.loads((path / "manifest.json").read_bytes())
    del body["xxh3"]
    change(body)
    body["xxh3"] = xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(body))
    info = Checkpointer(tmp_path).load_latest({"x": None})
    assert info is not None
    assert (info.path, len(info.passed_over)) == (good, 1)
    assert "manifest.json" in info.passed_over[0].reason


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.json"])
@pytest.mark.parametrize("text", [b"[" * 200_000, b"null", b"3", b"{}", b"\xff\xfe"])
def test_json_of_another_kind_is_refused(file: str, text: bytes, tmp_path: Path) -> None:
    path = Path(Checkpointer(tmp_path).save({"x": 1}, step=1))
    if file == "manifest.json":
        (path / file).write_bytes(text)
    else:
        whole = json.loads((path / "manifest.json").read_bytes())
        whole["files"][file] = {"size_bytes": len(text), "xxh3": xxh3_64_hexdigest(text)}
        del whole["xxh3"]
        whole["xxh3"] = xxh3_64_hexdigest(json.dumps(whole, sort_keys=True).encode())
        (path / "manifest.json").write_text(json.dumps(whole))
        (path / file).write_bytes(text)
    with pytest.raises(CheckpointFailed, match=f"is whole.*{file} cannot be read"):
        Checkpointer(tmp_path).load_latest({"x": None})


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    """Their sizes make up the tensor, but some of it would be whatever was in memory."""
    settings = CheckpointSettings(part_bytes=20)
    path = Path(Checkpointer(tmp_path, settings=settings).save({"x": torch.arange(10.0)}, step=1))
    _rewritten(path, lambda body: body["chunks"][1].update(offsets=body["chunks"][0]["offsets"]))
    with pytest.raises(CheckpointFailed, match="parts of x overlap"):
        Checkpointer(tmp_path).load_latest({"x": None})


def test_what_is_no_folder_is_passed_over(tmp_path: Path) -> None:
    good = Checkpointer(tmp_path).save({"x": 1}, step=1)
    newer = Path(good.replace("step-000000000001", "step-000000000002"))
    newer.write_bytes(b"not a folder")
    checkpointer = Checkpointer(tmp_path)
    info = checkpointer.load_latest({"x": None})
    assert info is not None
    assert info.path == good
    assert "manifest.json is missing" in info.passed_over[0].reason
    checkpointer.save({"x": 2}, step=3)


def test_another_optimizers_groups_are_listed_before_anything_is_loaded(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    weights = model.weight.detach().clone()
    Checkpointer(tmp_path).save(
        {"model": torch.nn.Linear(2, 2), "optimizer": torch.optim.SGD(model.parameters())}, step=1
    )
    fewer = torch.optim.SGD([model.weight])
    more = torch.optim.SGD([{"params": [model.weight]}])
    more.add_param_group({"params": [model.bias]})
    for optimizer, line in [
        (fewer, r"optimizer.param_groups\[0\]: 1 parameters here, 2 in the checkpoint"),
        (more, "optimizer.param_groups: 2 here, 1 in the checkpoint"),
    ]:
        with pytest.raises(ValueError, match=line):
            Checkpointer(tmp_path).load_latest({"model": model, "optimizer": optimizer})
    assert torch.equal(model.weight, weights)
