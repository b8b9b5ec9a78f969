"""`stretto checkpoints`: tables for people, JSON for programs, exit codes for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from saving.likeness import same
from saving.training import damage, train, training_state
from stretto.checkpoint import Checkpointer
from stretto.commands import checkpoints as command
from typer.testing import CliRunner


def _run(*arguments: object) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)], env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = training_state()
    checkpointer = Checkpointer(tmp_path / "checkpoints", job="digits")
    for step in (1, 2):
        train(state, step)
        checkpointer.save(state, step=step, generation=3, tau=step * 1.5)
    return tmp_path / "checkpoints"


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    return dict(sorted(load_file(file).items()))


def _newest(folder: Path) -> Path:
    return max(folder.glob("generation-*"))


def test_lists_the_newest_first(folder: Path) -> None:
    result = _run("list", folder)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1].startswith("generation-0000000003-step-000000000002")
    assert "3.0" in lines[1]
    assert [row["step"] for row in json.loads(_run("list", folder, "--json").output)] == [2, 1]


def test_verify_reads_every_byte_and_tells_scripts_by_its_code(folder: Path) -> None:
    assert _run("verify", folder).exit_code == 0
    damage(next(_newest(folder).glob("*.safetensors")), "flip a bit")
    result = _run("verify", folder)
    assert result.exit_code == 1
    assert "rank-00000-part-0000.safetensors does not match its checksum" in result.output
    rows = json.loads(_run("verify", folder, "--json").output)
    assert [row["whole"] for row in rows] == [False, True]
    assert _run("verify", min(folder.glob("generation-*"))).exit_code == 0


def test_list_shows_what_is_incomplete(folder: Path) -> None:
    (_newest(folder) / "manifest.json").unlink()
    assert "manifest.json is missing: the save did not end" in _run("list", folder).output


def test_shows_who_wrote_a_checkpoint_and_its_tensors(folder: Path) -> None:
    result = _run("show", folder)
    assert result.exit_code == 0, result.output
    for word in ("digits", "model, note, optimizer", "model.0.weight", "F32", "4x3"):
        assert word in result.output
    shown = json.loads(_run("show", _newest(folder), "--json").output)
    assert shown["tensors"]["model.0.weight"] == {"dtype": "F32", "shape": [4, 3]}
    assert shown["format_version"] == 2


def test_exports_the_model_for_any_tool(folder: Path, tmp_path: Path) -> None:
    result = _run("export", folder, "--to", tmp_path / "model.safetensors")
    assert result.exit_code == 0, result.output
    state = training_state()
    Checkpointer(folder).load_latest(state)
    assert same(_tensors(tmp_path / "model.safetensors"), dict(sorted(state["model"].state_dict().items())))


def test_a_damaged_checkpoint_is_not_exported(folder: Path, tmp_path: Path) -> None:
    damage(next(_newest(folder).glob("*.safetensors")), "flip a bit")
    result = _run("export", folder, "--to", tmp_path / "model.safetensors")
    assert result.exit_code == 1
    assert "does not match its checksum" in result.output
    assert not (tmp_path / "model.safetensors").exists()


def test_says_what_is_wrong_with_the_request(folder: Path, tmp_path: Path) -> None:
    result = _run("export", folder, "--to", tmp_path / "x", "--entry", "weights")
    assert result.exit_code == 2
    assert "it holds model, note, optimizer" in result.output
    assert _run("show", tmp_path / "empty").exit_code == 1
    assert _run("verify", tmp_path / "empty").exit_code == 1
    assert _run("list", "nowhere://x").exit_code == 2


def test_tied_weights_are_exported_under_both_names(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    Checkpointer(tmp_path / "c").save({"model": model}, step=1)
    assert _run("export", tmp_path / "c", "--to", tmp_path / "model.safetensors").exit_code == 0
    assert same(_tensors(tmp_path / "model.safetensors"), dict(sorted(model.state_dict().items())))
