"""The `stretto` command: a subcommand whose dependencies are missing says so and leaves the others alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer
from stretto import cli
from typer.testing import CliRunner


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "stretto.commands")


def build(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> typer.Typer:
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    return cli.build_app()


def test_a_command_with_missing_dependencies_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    app = build(
        monkeypatch,
        entry("controller", "stretto_controller.cli:register"),
        entry("run", "module_that_nobody_has:register"),
    )
    result = CliRunner().invoke(app, ["run", "--nnodes", "1:4", "train.py"])
    assert result.exit_code == 1
    assert "stretto run needs the module module_that_nobody_has" in result.output
    assert "pip install 'stretto[worker]'" in result.output
    assert CliRunner().invoke(app, ["controller", "--help"]).exit_code == 0
    assert "stretto[worker]" in CliRunner().invoke(app, ["--help"]).output


def test_a_fault_in_a_command_s_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError):
        build(monkeypatch, entry("run", "stretto.cli:no_such_function"))


def test_the_command_line_starts_without_torch_or_the_controller_s_servers() -> None:
    code = (
        "import sys; from stretto.cli import build_app; build_app();"
        "print([name for name in ('torch', 'fastapi', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
