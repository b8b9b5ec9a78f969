"""What `stretto jobs` prints: tables for 80 columns, and JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from stretto_proto.v1 import jobs_pb2, types_pb2

from stretto.top.view import duration

_MODES = {
    types_pb2.AUTOSCALE_MODE_OFF: "off",
    types_pb2.AUTOSCALE_MODE_RECOMMEND: "recommend",
    types_pb2.AUTOSCALE_MODE_ACT: "act",
}
_GOALS = {
    types_pb2.AUTOSCALE_GOAL_PROGRESS: "progress",
    types_pb2.AUTOSCALE_GOAL_COST: "cost",
    types_pb2.AUTOSCALE_GOAL_DEADLINE: "deadline",
}


def plain(message: Message) -> dict[str, Any]:
    """The message as JSON has it."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(value: Message | Sequence[Message], *, line: bool = False) -> None:
    """line: on one line, where more follow."""
    found = plain(value) if isinstance(value, Message) else [plain(message) for message in value]
    typer.echo(json.dumps(found) if line else json.dumps(found, indent=2))


def jobs_table(jobs: Sequence[jobs_pb2.Job]) -> Table:
    """One row per job."""
    table = _table("job", "phase", "nodes", "S", "gain", "tau", "rate", "left", right=("S", "gain", "tau", "rate"))
    for job in jobs:
        active = sum(1 for node in job.nodes if node.state == "active")
        target = f"/{job.spec.target_tau:.0f}" if job.spec.target_tau else ""
        best = job.recommendation.nodes
        advice = f" (best {best})" if best and best != job.desired_nodes else ""
        table.add_row(
            Text(job.name),
            job.phase,
            f"{active}/{job.desired_nodes}{advice}",
            f"{job.generation.scale:g}",
            f"{job.progress.gain:.2f}",
            f"{job.progress.tau:.0f}{target}",
            f"{job.progress_rate:.3g}/s",
            duration(job.remaining_s),
        )
    return table


def job_view(job: jobs_pb2.Job) -> RenderableType:
    """One job: its figures, why it is as it is, its nodes."""
    parts: list[RenderableType] = [jobs_table([job])]
    generation = f"generation {job.generation.number}, " if job.generation.number else ""
    spec = job.spec
    parts.append(
        Text(f"{generation}step {job.progress.step}, {spec.min_nodes} to {spec.max_nodes} nodes; {job.reason}")
    )
    parts.append(Text(f"autoscale {autoscale_words(job.autoscale)}"))
    if job.recommendation.reason:
        parts.append(Text(f"  {job.recommendation.reason}"))
    if job.nodes:
        parts.append(nodes_table(job.nodes))
    return Group(*parts)


def autoscale_words(autoscale: types_pb2.Autoscale) -> str:
    """The settings on one line."""
    words = [_MODES.get(autoscale.mode, "?"), f"goal {_GOALS.get(autoscale.goal, '?')}"]
    words.append(f"floor {autoscale.efficiency_floor:.0%}")
    if autoscale.deadline_s:
        words.append(f"deadline {time.strftime('%Y-%m-%d %H:%M', time.localtime(autoscale.deadline_s))}")
    if autoscale.weight != 1:
        words.append(f"weight {autoscale.weight:g}")
    if autoscale.priority:
        words.append(f"priority {autoscale.priority}")
    return ", ".join(words)


def sizes_view(job: jobs_pb2.Job) -> RenderableType:
    """How a job's size is chosen, which is best and why, and what is predicted for each."""
    parts: list[RenderableType] = [Text(f"{job.name}: {autoscale_words(job.autoscale)}")]
    recommendation = job.recommendation
    parts.append(Text(recommendation.reason or "its size was not looked at yet"))
    if recommendation.batch_size:
        parts.append(
            Text(
                f"batches of {recommendation.batch_size} per worker and {recommendation.accumulation} of them per step "
                "would make more of that size"
            )
        )
    if recommendation.sizes:
        parts.append(sizes_table(job))
    return Group(*parts)


def sizes_table(job: jobs_pb2.Job) -> Table:
    """One row per size."""
    numbers = ("nodes", "workers", "S", "gain", "step", "d(tau)/dt", "efficiency")
    table = _table(*numbers, "", right=numbers)
    for size in job.recommendation.sizes:
        notes = ["seen"] if size.seen else ["a guess"] if size.extrapolated else []
        if size.nodes == job.desired_nodes:
            notes.append("wanted")
        if size.nodes == job.recommendation.nodes:
            notes.append("best")
        error = f" ± {1000 * size.step_seconds_error:.0f}" if size.step_seconds_error else ""
        table.add_row(
            str(size.nodes),
            str(size.world_size),
            f"{size.scale:g}",
            f"{size.gain:.2f}",
            f"{1000 * size.step_seconds:.3g}{error} ms",
            f"{size.progress_rate:.3g}/s",
            f"{size.marginal_efficiency:.0%}",
            ", ".join(notes),
        )
    return table


def nodes_table(nodes: Sequence[jobs_pb2.Node]) -> Table:
    """One row per node."""
    table = _table("node", "state", "rank", "slots", "address", "last heard", right=("rank", "slots"))
    for node in nodes:
        heard = f"{node.silent_s:.1f} s ago" if node.connected else "not connected"
        rank = str(node.node_rank) if node.node_rank >= 0 else "-"
        table.add_row(Text(node.node_id), node.state, rank, str(node.slots), Text(node.address), heard)
    return table


def events_table(found: Sequence[jobs_pb2.Event], *, headed: bool = True) -> Table:
    """One row per event. Widths are fixed, so that those that follow stand below each other."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=headed)
    table.add_column("#", width=5, justify="right")
    table.add_column("time", width=8)
    table.add_column("event", width=18, overflow="fold")
    table.add_column("reason", overflow="fold")
    for event in found:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time_s))
        table.add_row(str(event.sequence), clock, event.kind, Text(event.reason))
    return table


def generations_table(found: Sequence[jobs_pb2.GenerationSummary]) -> Table:
    """One row per generation."""
    table = _table("#", "nodes", "S", "gain", "lr", "steps", "tau", "paused", "ended by", right=("#", "nodes", "steps"))
    for summary in found:
        generation = summary.generation
        table.add_row(
            str(generation.number),
            str(len(generation.members)),
            f"{generation.scale:g}",
            f"{summary.mean_gain:.2f}" if summary.steps else "-",
            f"{summary.effective_lr:.3g}" if summary.steps else "-",
            str(summary.steps),
            f"{summary.first_tau:.0f} -> {summary.last_tau:.0f}",
            f"{summary.pause_s:.2f} s",
            Text(summary.end_reason or "-"),
        )
    return table


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    return table
