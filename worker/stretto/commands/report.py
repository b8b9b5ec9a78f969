"""`stretto report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stretto.channel import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE
from stretto.client import JobsClient
from stretto.commands.jobs import Endpoint
from stretto.errors import StrettoError
from stretto.report.page import page
from stretto.report.run import Run, from_controller


def register(parent: typer.Typer) -> None:
    """Add the command to `stretto`."""
    parent.command("report")(report)


def report(
    job: Annotated[str, typer.Argument(help="The job's name; the controller is asked for it.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    checkpoints: Annotated[
        str,
        typer.Option(help="Instead of a job: the folder of its checkpoints (a path, or any URL that fsspec knows)."),
    ] = "",
    endpoint: Endpoint = None,
) -> None:
    """Write a run as one page of pictures: tau, gain, scale, learning rate, loss, generations and events.

    From the controller's history, or with --checkpoints from a folder of checkpoints, where no controller is left.
    """
    try:
        if bool(job) == bool(checkpoints):
            raise ValueError("give either a job's name, or --checkpoints and their folder")
        run = _from_checkpoints(checkpoints) if checkpoints else _from_controller(job, endpoint)
        output.write_text(page(run), encoding="utf-8")
    except (ValueError, OSError, StrettoError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
    typer.echo(f"wrote {output} ({output.stat().st_size / 1024:.0f} KiB)")


def _from_controller(job: str, endpoint: str | None) -> Run:
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
    with JobsClient(endpoint) as client:
        return from_controller(client, job, endpoint)


def _from_checkpoints(url: str) -> Run:
    # Late: it takes torch, which a machine that only asks the controller need not have.
    from stretto.report.saved import from_checkpoints

    return from_checkpoints(url)
