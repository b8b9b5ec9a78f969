"""`stretto jobs`: look at jobs, and change them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from google.protobuf.message import Message
from rich.console import Console, RenderableType
from rich.live import Live
from stretto_proto.v1 import jobs_pb2, types_pb2

from stretto.channel import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE
from stretto.client import JobsClient
from stretto.commands.job_spec import job_spec
from stretto.commands.job_tables import (
    events_table,
    generations_table,
    job_view,
    jobs_table,
    print_json,
    sizes_view,
)
from stretto.errors import NotFound, StrettoError

_REFUSED, _BAD_INPUT, _NOT_FOUND = 1, 2, 3
_COMPLETION_S = 1.0
_FOLLOW_S = 0.5
_FINISHED = ("succeeded", "failed")

FoundT = TypeVar("FoundT", bound="Message | Sequence[Message]")

Endpoint = Annotated[
    str | None,
    typer.Option(
        help=f"The controller, HOST[:PORT]. Default: the variable {ENDPOINT_VARIABLE}, then {DEFAULT_ENDPOINT}.",
        show_default=False,
    ),
]


def _job_names(incomplete: str) -> list[str]:
    """For the shell's completion: the jobs of the controller that the environment names; none if it does not answer."""
    try:
        endpoint = os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
        with JobsClient(endpoint, timeout_s=_COMPLETION_S) as client:
            return [job.name for job in client.list() if job.name.startswith(incomplete)]
    except (ValueError, StrettoError):
        return []


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it, until Ctrl-C.")]
Interval = Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=0.1, max=3600.0)]
JobName = Annotated[str, typer.Argument(help="The job's name.", show_default=False, autocompletion=_job_names)]


class Mode(StrEnum):
    OFF = "off"
    RECOMMEND = "recommend"
    ACT = "act"


class Reconfigure(StrEnum):
    IN_PROCESS = "in-process"
    RESTART = "restart"


class Goal(StrEnum):
    PROGRESS = "progress"
    COST = "cost"
    DEADLINE = "deadline"


app = typer.Typer(
    no_args_is_help=True,
    help="Look at jobs, and change them.\n\n"
    "Exit codes: 0 done, 1 refused or no controller answered, 2 bad input, 3 no such job or node.",
)


def register(parent: typer.Typer) -> None:
    """Add `jobs` to the command that collects all subcommands."""
    parent.add_typer(app, name="jobs")


@contextmanager
def _client(endpoint: str | None) -> Iterator[JobsClient]:
    """A client of the chosen controller; an error ends the command with its message and code."""
    try:
        with JobsClient(endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT) as client:
            yield client
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except (ValueError, StrettoError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        code = _BAD_INPUT if isinstance(error, ValueError) else _REFUSED
        raise typer.Exit(_NOT_FOUND if isinstance(error, NotFound) else code) from error


@app.command("list")
def list_jobs(
    endpoint: Endpoint = None, as_json: AsJson = False, watch: Watch = False, interval: Interval = 1.0
) -> None:
    """Show every job in one table."""

    def picture(jobs: Sequence[jobs_pb2.Job]) -> RenderableType:
        return jobs_table(jobs) if jobs else "no jobs"

    with _client(endpoint) as client:
        _show(client.list, picture, as_json, interval if watch else None)


@app.command()
def show(
    job: JobName, endpoint: Endpoint = None, as_json: AsJson = False, watch: Watch = False, interval: Interval = 1.0
) -> None:
    """Show one job: its figures, its best size and why, its nodes."""
    with _client(endpoint) as client:
        _show(lambda: client.get(job), job_view, as_json, interval if watch else None)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The new job's name.", show_default=False)],
    min_nodes: Annotated[int | None, typer.Option(help="It trains with so few.", show_default=False)] = None,
    max_nodes: Annotated[int | None, typer.Option(help="And with so many. Default: the minimum.")] = None,
    nodes: Annotated[int | None, typer.Option(help="How many it should have now. Default: the maximum.")] = None,
    mode: Annotated[Reconfigure | None, typer.Option(help="Default: in-process.", show_default=False)] = None,
    base_batch_size: Annotated[int | None, typer.Option(help="Which the schedule was written for.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a worker's step.")] = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Samples of all workers' step, instead.")] = None,
    target_tau: Annotated[float | None, typer.Option(help="Training ends there.")] = None,
    spec: Annotated[Path | None, typer.Option(help="The same, from a JSON file; options overrule it.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Create a job before any node comes. Who comes later must ask for the same; what is not said here, they say."""
    options = {
        "min_nodes": min_nodes,
        "max_nodes": max_nodes,
        "desired_nodes": nodes,
        "mode": mode.value if mode else None,
        "base_batch_size": base_batch_size,
        "batch_size": batch_size,
        "global_batch_size": global_batch_size,
        "target_tau": target_tau,
    }
    with _client(endpoint) as client:
        wanted, desired_nodes = job_spec(spec, options)
        _print_job(client.create(name, wanted, desired_nodes=desired_nodes), as_json)


@app.command()
def scale(
    job: JobName,
    nodes: Annotated[int, typer.Argument(help="How many nodes the job should have.", show_default=False)],
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Say how many nodes the job should have from now on. Ends mode act: who scales by hand takes over."""
    with _client(endpoint) as client:
        _print_job(client.scale(job, nodes), as_json)


@app.command()
def autoscale(
    job: JobName,
    mode: Annotated[
        Mode | None,
        typer.Argument(help="off: predict only; recommend: and say what is best; act: and do it.", show_default=False),
    ] = None,
    goal: Annotated[
        Goal | None, typer.Option(help="What a size is chosen for: speed, worker-hours, or a deadline.")
    ] = None,
    floor: Annotated[
        float | None, typer.Option(help="What each added node must bring, as a share of the first ones: 0.5.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="For the goal deadline: 2026-11-21T18:00 (local time), or +90m, +8h, +2d.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Where jobs share nodes: this one's weight, 1.")] = None,
    priority: Annotated[int | None, typer.Option(help="Where nodes are short: higher ones get theirs first.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
    watch: Watch = False,
    interval: Interval = 1.0,
) -> None:
    """Show what each size would bring and which is best, and why; or say how the size is chosen."""
    with _client(endpoint) as client:
        wanted = types_pb2.Autoscale(
            mode=types_pb2.AutoscaleMode.Value(f"AUTOSCALE_MODE_{mode.name if mode else 'UNSPECIFIED'}"),
            goal=types_pb2.AutoscaleGoal.Value(f"AUTOSCALE_GOAL_{goal.name if goal else 'UNSPECIFIED'}"),
            efficiency_floor=_above_zero("--floor", floor),
            weight=_above_zero("--weight", weight),
            deadline_s=_moment_s(deadline) if deadline else 0.0,
            priority=priority,
        )
        if wanted.ByteSize():
            client.set_autoscale(job, wanted)
        _show(lambda: client.get(job), sizes_view, as_json, interval if watch else None)


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
    as_json: AsJson = False,
) -> None:
    """Dismiss the job's nodes and forget it. Asks first, unless the job is finished."""
    with _client(endpoint) as client:
        found = client.get(job) if as_json or not yes else None
        if not yes and found is not None and found.phase not in _FINISHED:
            if not sys.stdin.isatty():
                raise ValueError(
                    f"the job {job!r} is {found.phase}; say --yes to end and forget it without being asked"
                )
            typer.confirm(f"The job {job!r} is {found.phase}. End and forget it?", abort=True)
        client.delete(job)
        if found is not None and as_json:
            print_json(found)
        else:
            typer.echo(f"the job {job!r} is deleted")


@app.command()
def events(
    job: JobName,
    after: Annotated[int, typer.Option(help="Only events after this sequence number.", min=0)] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as they happen, until the job's end; JSON: one a line.")
    ] = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Tell the job's story, oldest event first."""
    with _client(endpoint) as client:
        if follow:
            _follow(client, job, after, as_json)
        else:
            _show(lambda: client.events(job, after_sequence=after), events_table, as_json, None)


@app.command()
def generations(job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show the job's memberships so far, with scale, gain and pauses."""
    with _client(endpoint) as client:
        _show(lambda: client.generations(job), generations_table, as_json, None)


def _follow(client: JobsClient, job: str, after: int, as_json: bool) -> None:
    """Print events as they come, until the job is finished or deleted."""
    console, headed, seen = Console(), True, False
    while True:
        try:
            ended = client.get(job).phase in _FINISHED
            found = client.events(job, after_sequence=after)
        except NotFound:
            if not seen:
                raise
            return
        seen = True
        if as_json:
            for event in found:
                print_json(event, line=True)
        elif found:
            console.print(events_table(found, headed=headed))
            headed = False
        sys.stdout.flush()
        after = found[-1].sequence if found else after
        if ended:
            return
        time.sleep(_FOLLOW_S)


def _print_job(job: jobs_pb2.Job, as_json: bool) -> None:
    _show(lambda: job, job_view, as_json, None)


def _show(
    look: Callable[[], FoundT], picture: Callable[[FoundT], RenderableType], as_json: bool, interval_s: float | None
) -> None:
    """Print what there is; with an interval, again and again: in place on a terminal, else one below the other."""
    console = Console()
    if interval_s is None:
        found = look()
        print_json(found) if as_json else console.print(picture(found))
        return
    if console.is_terminal and not as_json:
        with Live(picture(look()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                live.update(picture(look()), refresh=True)
    while True:
        found = look()
        print_json(found, line=True) if as_json else console.print(picture(found))
        sys.stdout.flush()
        time.sleep(interval_s)


def _above_zero(option: str, value: float | None) -> float:
    """0.0, which says nothing on the wire, for what was not given."""
    if value is None:
        return 0.0
    if not value > 0:
        raise ValueError(f"{option} is {value}; it must be above 0")
    return value


def _moment_s(text: str) -> float:
    """Seconds since the Unix epoch of a local time, or of so much from now."""
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    try:
        if text.startswith("+") and text[-1] in units:
            return (datetime.now().astimezone() + timedelta(**{units[text[-1]]: float(text[1:-1])})).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"--deadline is {text!r}; give a time such as 2026-11-21T18:00, or one from now: +90m, +8h, +2d"
        ) from error
