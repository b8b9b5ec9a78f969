"""`stretto report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stretto.channel import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE
from stretto.client import JobsClient
from stretto.commands.jobs import Endpoint, JobName
from stretto.errors import StrettoError
from stretto.report.page import page


def register(parent: typer.Typer) -> None:
    """Add the command to `stretto`."""
    parent.command("report")(report)


def report(
    job: JobName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    endpoint: Endpoint = None,
) -> None:
    """Write a run as one page of pictures: tau, gain, scale, learning rate, loss, generations and events."""
    try:
        with JobsClient(endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT) as client:
            text = page(client.get(job), client.points(job), client.generations(job), client.events(job))
        output.write_text(text, encoding="utf-8")
    except (ValueError, OSError, StrettoError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
    typer.echo(f"wrote {output} ({output.stat().st_size / 1024:.0f} KiB)")
