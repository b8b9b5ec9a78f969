"""`stretto jobs`: look at jobs, and change them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from stretto_proto.v1 import jobs_pb2

from stretto.channel import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE
from stretto.client import JobsClient
from stretto.errors import StrettoError

T = TypeVar("T")

Endpoint = Annotated[
    str | None,
    typer.Option(
        help=f"The controller, HOST[:PORT]. Default: the variable {ENDPOINT_VARIABLE}, then {DEFAULT_ENDPOINT}.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JobName = Annotated[str, typer.Argument(help="The job's name.", show_default=False)]

app = typer.Typer(no_args_is_help=True, help="Look at jobs, and change them.")


def register(parent: typer.Typer) -> None:
    """Add `jobs` to the command that collects all subcommands."""
    parent.add_typer(app, name="jobs")


@contextmanager
def _client(endpoint: str | None) -> Iterator[JobsClient]:
    """A client of the chosen controller; an error ends the command with its message and code 1 (2: bad input)."""
    try:
        with JobsClient(endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT) as client:
            yield client
    except ValueError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except StrettoError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command("list")
def list_jobs(endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show every job in one table."""
    with _client(endpoint) as client:
        jobs = client.list()
    _show(jobs, as_json, lambda: jobs_table(jobs))


@app.command()
def show(job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show one job: its figures and its nodes."""
    with _client(endpoint) as client:
        found = client.get(job)
    _print_job(found, as_json)


@app.command()
def scale(
    job: JobName,
    nodes: Annotated[int, typer.Argument(help="How many nodes the job should have.", show_default=False)],
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Say how many nodes the job should have from now on."""
    with _client(endpoint) as client:
        _print_job(client.scale(job, nodes), as_json)


@app.command()
def pause(job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Save, let the workers rest (in restart mode: stop them), and keep the nodes."""
    with _client(endpoint) as client:
        _print_job(client.pause(job), as_json)


@app.command()
def resume(job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Go on after a pause."""
    with _client(endpoint) as client:
        _print_job(client.resume(job), as_json)


@app.command()
def drain(
    job: JobName,
    node: Annotated[str, typer.Argument(help="The node, as `show` names it.", show_default=False)],
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Let one node leave at the next step boundary."""
    with _client(endpoint) as client:
        _print_job(client.drain(job, node), as_json)


@app.command()
def checkpoint(job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Have a checkpoint written at the next step boundary; training goes on. `events` tells when it is there."""
    with _client(endpoint) as client:
        _print_job(client.checkpoint(job), as_json)


@app.command()
def delete(
    job: JobName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Dismiss the job's nodes and forget it."""
    if not yes:
        typer.confirm(f"End and forget the job {job!r}?", abort=True)
    with _client(endpoint) as client:
        client.delete(job)


@app.command()
def events(
    job: JobName,
    after: Annotated[int, typer.Option(help="Only events after this sequence number.", min=0)] = 0,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Tell the job's story, oldest event first."""
    with _client(endpoint) as client:
        found = client.events(job, after_sequence=after)
    _show(found, as_json, lambda: events_table(found))


@app.command()
def generations(job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show the job's memberships so far, with scale, gain and pauses."""
    with _client(endpoint) as client:
        found = client.generations(job)
    _show(found, as_json, lambda: generations_table(found))


def _print_job(job: jobs_pb2.Job, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_plain(job), indent=2))
        return
    console = Console()
    console.print(jobs_table([job]))
    if job.reason:
        console.print(job.reason, highlight=False)
    if job.nodes:
        console.print(nodes_table(job.nodes))


def _show(messages: Sequence[Message], as_json: bool, table: Callable[[], Table]) -> None:
    if as_json:
        typer.echo(json.dumps([_plain(message) for message in messages], indent=2))
    else:
        Console().print(table())


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def jobs_table(jobs: Sequence[jobs_pb2.Job]) -> Table:
    """One row per job."""
    table = _table("job", "phase", "nodes", "S", "generation", "step", "tau", "gain", "left")
    for job in jobs:
        active = sum(1 for node in job.nodes if node.state == "active")
        target = f" / {job.spec.target_tau:.0f}" if job.spec.target_tau else ""
        table.add_row(
            job.name,
            job.phase,
            f"{active} of {job.desired_nodes} ({job.spec.min_nodes}..{job.spec.max_nodes})",
            f"{job.generation.scale:g}",
            str(job.generation.number or "-"),
            str(job.progress.step),
            f"{job.progress.tau:.0f}{target}",
            f"{job.progress.gain:.2f}",
            f"{job.remaining_s:.0f} s" if job.remaining_s > 0 else "-",
        )
    return table


def nodes_table(nodes: Sequence[jobs_pb2.Node]) -> Table:
    """One row per node."""
    table = _table("node", "state", "rank", "slots", "address", "last heard")
    for node in nodes:
        heard = f"{node.silent_s:.1f} s ago" if node.connected else "not connected"
        rank = str(node.node_rank) if node.node_rank >= 0 else "-"
        table.add_row(node.node_id, node.state, rank, str(node.slots), node.address, heard)
    return table


def events_table(found: Sequence[jobs_pb2.Event]) -> Table:
    """One row per event."""
    table = _table("#", "time", "event", "node", "generation", "reason")
    for event in found:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time_s))
        generation = str(event.generation or "-")
        table.add_row(str(event.sequence), clock, event.kind, event.node_id or "-", generation, event.reason)
    return table


def generations_table(found: Sequence[jobs_pb2.GenerationSummary]) -> Table:
    """One row per generation."""
    table = _table("generation", "members", "S", "mean gain", "effective lr", "steps", "tau", "paused", "ended by")
    for summary in found:
        generation = summary.generation
        table.add_row(
            str(generation.number),
            str(len(generation.members)),
            f"{generation.scale:g}",
            f"{summary.mean_gain:.3f}" if summary.steps else "-",
            f"{summary.effective_lr:.4g}" if summary.steps else "-",
            str(summary.steps),
            f"{summary.first_tau:.0f} -> {summary.last_tau:.0f}",
            f"{summary.pause_s:.2f} s",
            summary.end_reason or "-",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
