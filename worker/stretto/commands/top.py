"""`stretto top`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from stretto.channel import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE
from stretto.client import JobsClient
from stretto.commands.jobs import Endpoint
from stretto.errors import StrettoError


def register(parent: typer.Typer) -> None:
    """Add the command to `stretto`."""
    parent.command("top")(top)


def top(
    endpoint: Endpoint = None,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end, for scripts.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=60.0)] = 1.0,
) -> None:
    """Watch all jobs in a terminal: phase, nodes, gain, tau, d(tau)/dt; scale and pause them with a key."""
    # Late: the screen needs a terminal's modules, which other systems lack.
    from stretto.top.screen import show_once, watch

    console = Console()
    try:
        with JobsClient(endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT) as client:
            if once:
                show_once(client, console)
            elif not (sys.stdin.isatty() and console.is_terminal):
                raise ValueError("stretto top needs a terminal; without one, use stretto top --once")
            else:
                watch(client, console, interval)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except (ValueError, StrettoError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
