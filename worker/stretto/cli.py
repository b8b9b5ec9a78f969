"""The `stretto` command: each package brings its own subcommands through the entry-point group `stretto.commands`."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import typer

_GROUP = "stretto.commands"
# Which extra brings what a subcommand needs.
_EXTRAS = {
    "run": "worker",
    "demo": "all",
    "controller": "controller",
    "token": "controller",
    "simulate": "simulate",
    "k8s": "operator",
}


def build_app() -> typer.Typer:
    """The command with every subcommand that is installed. One that cannot be loaded says so when it is called."""
    app = typer.Typer(
        help="Elastic PyTorch training whose learning rate stays right.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Help texts name extras in square brackets, which markup would swallow.
        rich_markup_mode=None,
    )

    # Its presence keeps subcommands subcommands even when there is only one.
    @app.callback()
    def root() -> None:
        pass

    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.name):
        _add(app, entry)
    return app


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        register = entry.load()
    except ModuleNotFoundError as error:
        _add_missing(app, entry, error)
        return
    register(app)


def _add_missing(app: typer.Typer, entry: EntryPoint, error: ModuleNotFoundError) -> None:
    """A subcommand that says what to install, so that the others work without it."""
    extra = _EXTRAS.get(entry.name)
    remedy = f"pip install 'stretto[{extra}]'" if extra else "install stretto again"
    message = f"stretto {entry.name} needs the module {error.name}, which is not installed: {remedy}"

    @app.command(entry.name, help=f"(not installed: {remedy})", context_settings={"ignore_unknown_options": True})
    def missing(arguments: list[str] = typer.Argument(None, hidden=True)) -> None:  # noqa: B008  # typer's way
        typer.echo(message, err=True)
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    build_app()()
