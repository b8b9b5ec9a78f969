"""`stretto checkpoints`: what a place holds, whether it is whole, and its model for others."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from stretto.checkpoint.loading import Contents
    from stretto.checkpoint.name import CheckpointName
    from stretto.checkpoint.store import Store

Url = Annotated[
    str,
    typer.Argument(
        help="The folder of a job's checkpoints, or one checkpoint in it: a path, or any URL that fsspec knows.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_WIDTH = 200  # of tables that no terminal shows
_LEAST_WIDTH = 110  # names are not to be broken

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, verify them, and export their models.")


def register(parent: typer.Typer) -> None:
    """Add `checkpoints` to the command that collects all subcommands."""
    parent.add_typer(app, name="checkpoints")


@app.command("list")
def list_checkpoints(url: Url, as_json: AsJson = False) -> None:
    """List the checkpoints, the newest first. Sizes are compared; `verify` reads every byte."""
    with _errors():
        store, names = _place(url)
        rows = [_row(store, name) for name in names]
    _show(rows, as_json, lambda: _rows_table(rows))
    if not rows:
        Console(stderr=True).print(f"{url} holds no checkpoints", highlight=False, soft_wrap=True)


@app.command()
def verify(url: Url, as_json: AsJson = False) -> None:
    """Read every byte and compare it with the manifest. Ends with code 1 where a checkpoint is not whole."""
    with _errors():
        from stretto.checkpoint.catalogue import Catalogue

        store, names = _place(url)
        found = [(name, Catalogue(store).verify(name)) for name in names]
    rows = [{"checkpoint": str(name), "whole": each.ok, "reason": each.reason} for name, each in found]
    _show(rows, as_json, lambda: _verdicts_table(rows))
    if not rows:
        _fail(f"{url} holds no checkpoints", 1)
    if not all(each.ok for _, each in found):
        raise typer.Exit(1)


@app.command()
def show(url: Url, as_json: AsJson = False) -> None:
    """Show one checkpoint, or the newest that is committed: who wrote it, its files, and the tensors in it."""
    with _errors():
        contents = _newest(url)
        shown = _described(contents)
    _show(shown, as_json, lambda: _tables(contents, shown))


@app.command()
def export(
    url: Url,
    to: Annotated[Path, typer.Option(help="The safetensors file to write.", show_default=False)],
    entry: Annotated[str, typer.Option(help="Which part of the state.")] = "model",
) -> None:
    """Write the model of one checkpoint, or of the newest, as a plain safetensors file. Every byte is checked."""
    with _errors():
        from stretto.checkpoint.export import export as write

        contents = _newest(url)
        tensors = write(_place(url)[0], contents.name, to, entry=entry)
    typer.echo(f"{tensors} tensors of {contents.name} are in {to}")


@contextmanager
def _errors() -> Iterator[None]:
    """An error ends the command with its message and code 1 (2: bad input)."""
    from stretto.checkpoint.errors import Damaged
    from stretto.errors import StrettoError

    try:
        yield
    except ValueError as error:
        _fail(str(error), 2)
    except (StrettoError, Damaged, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print("[red]error:[/]", escape(message), highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _place(url: str) -> tuple[Store, list[CheckpointName]]:
    """The folder, and the checkpoints that are meant: the one that is named, or all, the newest first."""
    from stretto.checkpoint.catalogue import Catalogue
    from stretto.checkpoint.name import CheckpointName
    from stretto.checkpoint.store import Store

    folder, _, last = url.rstrip("/").rpartition("/")
    name = CheckpointName.parse(last)
    if name is not None:
        return Store(folder or "."), [name]
    store = Store(url)
    return store, Catalogue(store).newest_first()


def _newest(url: str) -> Contents:
    from stretto.checkpoint.catalogue import Catalogue
    from stretto.checkpoint.errors import CheckpointFailed
    from stretto.checkpoint.loading import Contents

    store, names = _place(url)
    name = next((name for name in names if Catalogue(store).committed(name)), None)
    if name is None:
        raise CheckpointFailed(f"{url} holds no checkpoint that is committed")
    return Contents(store, name)


def _row(store: Store, name: CheckpointName) -> dict[str, Any]:
    from stretto.checkpoint.catalogue import Catalogue
    from stretto.checkpoint.errors import Damaged

    row: dict[str, Any] = {"checkpoint": str(name), "generation": name.generation, "step": name.step}
    try:
        manifest = Catalogue(store).manifest(name)
    except Damaged as damage:
        return {**row, "problem": str(damage)}
    return {
        **row,
        "tau": manifest.tau,
        "world_size": manifest.world_size,
        "job": manifest.job,
        "created_s": manifest.created_s,
        "size_bytes": manifest.size_bytes,
        "files": len(manifest.files),
        "problem": "",
    }


def _described(contents: Contents) -> dict[str, Any]:
    manifest = contents.manifest
    return {
        "checkpoint": str(contents.name),
        "format_version": manifest.format_version,
        "tau": manifest.tau,
        "world_size": manifest.world_size,
        "job": manifest.job,
        "created_s": manifest.created_s,
        "size_bytes": manifest.size_bytes,
        "state": contents.saved_names(),
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "tensors": {name: {"dtype": form.dtype, "shape": form.shape} for name, form in contents.forms.items()},
    }


def _show(value: Any, as_json: bool, tables: Callable[[], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        width = int(os.environ.get("COLUMNS", "0")) or (Console().width if sys.stdout.isatty() else _WIDTH)
        Console(width=max(width, _LEAST_WIDTH)).print(tables(), soft_wrap=False)


def _rows_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("checkpoint", "tau", "ranks", "size", "age", "problem")
    for row in rows:
        if row["problem"]:
            table.add_row(row["checkpoint"], "-", "-", "-", "-", f"[red]{escape(row['problem'])}[/]")
            continue
        table.add_row(
            row["checkpoint"],
            f"{row['tau']:.1f}",
            str(row["world_size"]),
            _size(row["size_bytes"]),
            _age(time.time() - row["created_s"]),
            "",
        )
    return table


def _verdicts_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("checkpoint", "whole", "problem")
    for row in rows:
        table.add_row(row["checkpoint"], "[green]yes[/]" if row["whole"] else "[red]no[/]", escape(row["reason"]))
    return table


def _tables(contents: Contents, shown: dict[str, Any]) -> Table:
    manifest = contents.manifest
    facts = _table("", "")
    facts.show_header = False
    for name, value in (
        ("checkpoint", shown["checkpoint"]),
        ("job", manifest.job or "-"),
        ("tau", f"{manifest.tau:.1f}"),
        ("written", f"{_clock(manifest.created_s)} by {manifest.world_size} rank{'s' * (manifest.world_size > 1)}"),
        ("size", f"{_size(manifest.size_bytes)} in {len(manifest.files)} files"),
        ("state", ", ".join(shown["state"])),
    ):
        facts.add_row(name, value)
    tensors = _table("tensor", "dtype", "shape", "size")
    for name, form in contents.forms.items():
        tensors.add_row(name, form.dtype, "x".join(map(str, form.shape)) or "scalar", _size(form.size_bytes))
    both = Table.grid(padding=(1, 0))
    both.add_row(facts)
    both.add_row(tensors)
    return both


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _age(age_s: float) -> str:
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= 2 * size_s:
            return f"{age_s / size_s:.0f} {unit}"
    return f"{max(age_s, 0):.0f} s"


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "checkpoint")
    return table
