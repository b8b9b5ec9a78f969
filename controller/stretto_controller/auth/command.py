"""`stretto token`: make one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from stretto_controller.auth.access import Principal, Role
from stretto_controller.auth.tokens import issuer_line, line_of, new_issuer_key, new_token
from stretto_controller.core.errors import Rejected
from stretto_controller.wire import checks


class Kind(StrEnum):
    """What can be made: a token of a role, or a key that makes tokens."""

    ADMIN = "admin"
    VIEWER = "viewer"
    JOB = "job"
    ISSUER = "issuer"


def register(app: typer.Typer) -> None:
    """Add the command to `stretto`."""
    app.command("token")(token)


def token(
    role: Annotated[
        Kind,
        typer.Argument(
            help="admin: everything; viewer: sees everything; job: one job alone; issuer: a key with which the "
            "Kubernetes operator makes jobs' tokens."
        ),
    ],
    job: Annotated[str, typer.Argument(help="The job's name, with `job`.")] = "",
) -> None:
    """Make a token: on stdout the token, for STRETTO_TOKEN; on stderr the line for the controller's tokens file."""
    if (role is Kind.JOB) != bool(job):
        raise typer.BadParameter("give a job's name with `job`, and only then: stretto token job digits")
    if role is Kind.ISSUER:
        key = new_issuer_key()
        typer.echo(key)
        typer.echo(issuer_line(key), err=True)
        return
    try:
        who = Principal(Role(role), checks.job_name(job) if job else "")
    except Rejected as error:
        raise typer.BadParameter(error.message) from error
    made = new_token()
    typer.echo(made)
    typer.echo(line_of(who, made), err=True)
