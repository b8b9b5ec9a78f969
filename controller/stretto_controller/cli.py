"""`stretto controller`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from stretto_controller import logs
from stretto_controller.settings import read_settings


def register(app: typer.Typer) -> None:
    """Add the command to `stretto`."""
    app.command("controller")(controller)


def controller(
    grpc_port: Annotated[int | None, typer.Option(help="For agents and workers; 0: any free port. [29400]")] = None,
    http_port: Annotated[int | None, typer.Option(help="For page and metrics; 0: any free port. [8080]")] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on. [127.0.0.1]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where state is kept. [.stretto/controller]")] = None,
    store: Annotated[str | None, typer.Option(help="sqlite or etcd. [sqlite]")] = None,
    etcd_endpoints: Annotated[
        str | None, typer.Option(help="With --store etcd: HOST:PORT[,HOST:PORT...]. [127.0.0.1:2379]")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="HOST[:PORT] at which others reach this controller; with --store etcd.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate with its chain, PEM: serve TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Authority, PEM: only clients with a certificate of it.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="Hashes of tokens; `stretto token` makes its lines.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve other machines without TLS or without tokens.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console, or json: one object a line. [console]")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written once serving: addresses and pid, JSON.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file, TOML.", envvar="STRETTO_CONFIG")] = None,
) -> None:
    """Run the controller: decides who is a member of which job, and keeps its word after a crash.

    Every setting can also come from the environment (STRETTO_HTTP_PORT) or from the settings file.
    """
    flags = {
        "grpc_port": grpc_port,
        "http_port": http_port,
        "host": host,
        "data_dir": data_dir,
        "store": store,
        "etcd": {"endpoints": etcd_endpoints},
        "advertise": advertise,
        "security": {
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "tls_client_ca": tls_client_ca,
            "tokens": tokens,
        },
        "insecure": insecure,
        "log_format": log_format,
        "ready_file": ready_file,
    }
    try:
        settings = read_settings(flags, os.environ, config)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    logs.set_up(settings.log_format)
    try:
        # Late: `stretto --help` and this command's own help must not wait for gRPC and FastAPI.
        from stretto_controller.serve import serve
        from stretto_controller.store.contents import StoreError
    except ModuleNotFoundError as error:
        typer.echo(f"stretto controller needs {error.name}: pip install 'stretto[controller]'", err=True)
        raise typer.Exit(1) from error
    try:
        code = asyncio.run(serve(settings))
    except (StoreError, OSError, ValueError) as error:
        typer.echo(f"stretto controller: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(code)
