"""`stretto-operator`, and `stretto k8s`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stretto_operator.diff import Pace

_PREFIX = "STRETTO_OPERATOR_"
_Endpoint = Annotated[str, typer.Option(help="The controller as pods reach it. Default: STRETTO_ENDPOINT.")]


def register(app: typer.Typer) -> None:
    """Add `stretto k8s`."""
    k8s = typer.Typer(no_args_is_help=True, help="ElasticTrainingJobs on Kubernetes.", rich_markup_mode=None)

    # Its presence keeps `render` a subcommand.
    @k8s.callback()
    def root() -> None:
        pass

    k8s.command()(render)
    app.add_typer(k8s, name="k8s")


def render(
    file: Annotated[Path, typer.Option("--file", "-f", help="ElasticTrainingJobs in YAML; - for stdin.")],
    endpoint: _Endpoint = "",
) -> None:
    """Print what the operator would make of a job: no cluster is asked, no token is made."""
    from stretto_operator.render import rendered

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        typer.echo(
            rendered(text, endpoint or os.environ.get("STRETTO_ENDPOINT") or "stretto-controller:29400"), nl=False
        )
    except (OSError, ValueError) as error:
        typer.echo(f"stretto k8s render: {error}", err=True)
        raise typer.Exit(2) from error


def operate(
    namespace: Annotated[
        str, typer.Option(help="Look after the jobs of this namespace only.", envvar=_PREFIX + "NAMESPACE")
    ] = "",
    worker_endpoint: Annotated[
        str,
        typer.Option(
            help="The controller as pods reach it. Default: STRETTO_ENDPOINT.", envvar=_PREFIX + "WORKER_ENDPOINT"
        ),
    ] = "",
    issuer_key_file: Annotated[
        Path | None,
        typer.Option(
            help="The key of `stretto token issuer`: pods get tokens of their own.", envvar=_PREFIX + "ISSUER_KEY_FILE"
        ),
    ] = None,
    http_host: Annotated[
        str, typer.Option(help="Where /healthz and /readyz are served.", envvar=_PREFIX + "HTTP_HOST")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0: any.", envvar=_PREFIX + "HTTP_PORT")] = 8081,
    leader_election: Annotated[
        bool, typer.Option(help="Of several operators one acts.", envvar=_PREFIX + "LEADER_ELECTION")
    ] = True,
    lease_namespace: Annotated[
        str, typer.Option(help="Default: the operator's own.", envvar=_PREFIX + "LEASE_NAMESPACE")
    ] = "",
    lease_name: Annotated[str, typer.Option(envvar=_PREFIX + "LEASE_NAME")] = "stretto-operator",
    poll_interval_s: Annotated[
        float, typer.Option(help="How often the controller is asked.", envvar=_PREFIX + "POLL_INTERVAL_S")
    ] = 2.0,
    figures_interval_s: Annotated[
        float,
        typer.Option(help="How often tau and gain are written at most.", envvar=_PREFIX + "FIGURES_INTERVAL_S"),
    ] = 10.0,
    workers: Annotated[int, typer.Option(help="Jobs that are looked at at a time.", envvar=_PREFIX + "WORKERS")] = 16,
) -> None:
    """Look after the ElasticTrainingJobs of a cluster.

    The cluster: in a pod that pod's service account, elsewhere KUBECONFIG. The controller: STRETTO_ENDPOINT,
    STRETTO_TOKEN (an admin's), STRETTO_TLS_CA, STRETTO_INSECURE, as for every tool.
    """
    from stretto_operator.election import LeaseSettings
    from stretto_operator.settings import Settings, identity, own_namespace, surroundings

    endpoint = os.environ.get("STRETTO_ENDPOINT", "")
    try:
        around = surroundings(worker_endpoint or endpoint, issuer_key_file, os.environ)
        lease = LeaseSettings(lease_namespace or own_namespace(), lease_name, identity())
        settings = Settings(
            endpoint=endpoint,
            around=around,
            namespace=namespace or None,
            lease=lease if leader_election else None,
            http_host=http_host,
            http_port=http_port,
            poll_interval_s=poll_interval_s,
            workers=workers,
            pace=Pace(figures_s=figures_interval_s),
        )
        settings.validate()
    except ValueError as error:
        typer.echo(f"stretto-operator: {error}", err=True)
        raise typer.Exit(2) from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise typer.Exit(asyncio.run(_operate(settings)))


async def _operate(settings: object) -> int:
    """The exit code: 1 when the lead was lost, or where there is no cluster."""
    from kubernetes_asyncio.config import ConfigException

    from stretto_operator.kubernetes import Kubernetes, load_configuration
    from stretto_operator.operator_process import OperatorProcess, serve_health, stop_on_signals
    from stretto_operator.settings import Settings

    assert isinstance(settings, Settings)
    try:
        server = Kubernetes(await load_configuration())
    except ConfigException as error:
        typer.echo(f"stretto-operator: no cluster: {error}; run in a pod, or set KUBECONFIG", err=True)
        return 1
    process = OperatorProcess(server, settings)
    stop_on_signals(process)
    health = await serve_health(settings.http_host, settings.http_port)
    try:
        return 0 if await process.run() else 1
    finally:
        await health.cleanup()
        await server.close()


def main() -> None:
    """The console script."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(operate)
    app()
