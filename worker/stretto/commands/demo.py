"""`stretto demo`."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `stretto`."""
    app.command("demo")(demo)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave page and metrics up until Ctrl-C.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live view.")] = False,
) -> None:
    """Train a small CNN on real images while nodes come, are killed and drain: about a minute and a half.

    Ends with 0 if the accuracy is at most 2 points below that of one undisturbed worker.
    """
    # Late, so that the other subcommands do not wait for it.
    from stretto.demo.run import run_demo

    try:
        code = run_demo(keep=keep, plain=plain)
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)
