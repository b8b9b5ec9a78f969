"""`stretto simulate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleMode
from stretto_controller.simulate.policies import EqualShares, Fixed, Goodput, Policy
from stretto_controller.simulate.run import Outcome, Simulation
from stretto_controller.simulate.trace import Trace, read_trace


def register(parent: typer.Typer) -> None:
    """Add the command to `stretto`."""
    parent.command("simulate")(simulate)


def simulate(
    trace: Annotated[Path, typer.Argument(help="The trace, a YAML file (docs/goodput.md).", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw the outcome: plot.png, .svg, .pdf.")
    ] = None,
    floor: Annotated[float, typer.Option(help="The efficiency floor of every job.", min=0.01, max=1.0)] = 0.3,
    review: Annotated[float, typer.Option(help="Simulated seconds between two reviews.", min=1.0)] = 120.0,
    seed: Annotated[int, typer.Option(help="Of the noise in what is measured.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Play a trace of jobs on shared nodes under several policies, and compare them.

    The last row is a control: each job's policy is told the gradient's moments of another job.
    """
    try:
        read = read_trace(trace)
        outcomes = outcomes_of(read, floor, review, seed, quiet=as_json)
        if output is not None:
            # Late: matplotlib takes a second to import.
            from stretto_controller.simulate.plot import draw

            draw(outcomes, read, output)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        typer.echo(f"error: -o needs {error.name}: pip install 'stretto[simulate]'", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps([_plain(outcome) for outcome in outcomes], indent=2))
        return
    console = Console()
    console.print(f"{len(read.jobs)} jobs on {read.nodes} nodes, efficiency floor {floor:.0%}", highlight=False)
    console.print(_table(outcomes))
    if output is not None:
        console.print(f"wrote {output}", highlight=False)


def outcomes_of(trace: Trace, floor: float, review_s: float, seed: int, *, quiet: bool) -> list[Outcome]:
    """One for each policy, the last two goodput's own and its control."""
    autoscale = Autoscale(mode=AutoscaleMode.ACT, efficiency_floor=floor)
    runs: list[tuple[Policy, bool]] = [
        (Fixed(), False),
        (EqualShares(), False),
        (Goodput("throughput only", by_gain=False, autoscale=autoscale), False),
        (Goodput("goodput", autoscale=autoscale), False),
        (Goodput("goodput, moments shuffled", autoscale=autoscale), True),
    ]
    shown = track(runs, "simulating", console=Console(stderr=True), transient=True, disable=quiet)
    return [
        Simulation(trace, policy, review_s=review_s, seed=seed, shuffled=shuffled).run() for policy, shuffled in shown
    ]


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy")
    for column in ("mean completion", "tau per\nworker-hour", "slowdown of\nworst tenth", "fairness", "changes"):
        table.add_column(column, justify="right")
    goodput = next(outcome for outcome in outcomes if outcome.policy == "goodput")
    for outcome in outcomes:
        compared = ""
        if outcome is not goodput:
            compared = f" ({goodput.mean_completion_s / outcome.mean_completion_s - 1:+.0%})"
        table.add_row(
            outcome.policy,
            f"{outcome.mean_completion_s / 3600:.2f} h{compared:8}",
            f"{outcome.efficiency:.0%}",
            f"{outcome.worst_tenth:.1f}",
            f"{outcome.fairness:.2f}",
            str(outcome.changes),
        )
    table.caption = (
        "In brackets: goodput's mean completion against that policy's. tau per worker-hour: as a share of what one "
        "worker alone brings. Slowdown: completion over that of the job alone at its best sizes. Fairness: Jain's "
        "index of the jobs' speeds."
    )
    table.caption_justify = "left"
    return table


def _plain(outcome: Outcome) -> dict[str, object]:
    return {
        "policy": outcome.policy,
        "mean_completion_s": outcome.mean_completion_s,
        "efficiency": outcome.efficiency,
        "worst_tenth_slowdown": outcome.worst_tenth,
        "fairness": outcome.fairness,
        "worker_hours": outcome.worker_hours,
        "changes": outcome.changes,
        "completion_s": list(outcome.completion_s),
    }
