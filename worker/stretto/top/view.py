"""What `stretto top` shows, from what the controller said: no clock, no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from stretto_proto.v1 import jobs_pb2, types_pb2

SORTS = ("name", "phase", "left", "rate")
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"running": "green", "succeeded": "green", "failed": "red", "paused": "cyan"}
_EVENTS = 5
_NODES = 12
# What a screen has beside the list of jobs and the chosen one's details: headings, an answer, keys.
_FRAME_LINES = 7
# At least so many are the details', where there are many jobs.
_DETAIL_LINES = 13


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything on the screen. selected: a job's name; asking: a question that waits for an answer."""

    jobs: Sequence[jobs_pb2.Job] = ()
    # By job: recent values of d(tau)/dt, oldest first.
    rates: Mapping[str, Sequence[float]] | None = None
    events: Sequence[jobs_pb2.Event] = ()
    selected: str = ""
    sort: str = "name"
    asking: str = ""
    # The latest answer, or why there is none.
    told: str = ""
    failed: bool = False


def sparkline(values: Sequence[float], width: int) -> str:
    """The latest `width` values as bars between 0 and the largest; what is not a finite number is a gap."""
    shown = values[-width:]
    most = max((value for value in shown if math.isfinite(value)), default=0.0)
    if most <= 0:
        return "".join(_BARS[0] if math.isfinite(value) else " " for value in shown)
    return "".join(
        _BARS[min(len(_BARS) - 1, max(0, int(value / most * len(_BARS))))] if math.isfinite(value) else " "
        for value in shown
    )


def ordered(jobs: Sequence[jobs_pb2.Job], sort: str) -> list[jobs_pb2.Job]:
    """By the chosen column, then by name. Jobs whose remaining time is unknown come last."""

    def key(job: jobs_pb2.Job) -> tuple[str, float]:
        match sort:
            case "phase":
                return (job.phase, 0.0)
            case "left":
                return ("", job.remaining_s if job.remaining_s >= 0 else math.inf)
            case "rate":
                return ("", -job.progress_rate)
        return ("", 0.0)

    return sorted(jobs, key=lambda job: (key(job), job.name))


def duration(seconds: float) -> str:
    """At most six characters."""
    if seconds < 0:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 360_000 else f"{seconds / 86400:.0f} d"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} GB"


def draw(picture: Picture, width: int, height: int | None = None) -> RenderableType:
    """The whole screen, for a terminal of that width; 80 columns hold everything.

    height: in lines. Of more jobs than it holds, those around the chosen one are shown; None: all are.
    """
    jobs = ordered(picture.jobs, picture.sort)
    first, last = _window(
        jobs, picture.selected, len(jobs) if height is None else max(3, height - _FRAME_LINES - _DETAIL_LINES)
    )
    parts: list[RenderableType] = [_table(jobs[first:last], picture, width)]
    if last - first < len(jobs):
        parts.append(_line(f"jobs {first + 1} to {last} of {len(jobs)}", "dim"))
    chosen = next((job for job in picture.jobs if job.name == picture.selected), None)
    if chosen is not None:
        details = _details(chosen, picture, width)
        room = len(details) if height is None else max(4, height - (last - first) - _FRAME_LINES)
        parts += [Text(), *details[:room]]
    if picture.told:
        parts += [Text(), Text(picture.told, style="red" if picture.failed else "green")]
    if picture.asking:
        parts += [Text(), Text(picture.asking, style="bold yellow")]
    return Group(*parts)


def keys_line(sort: str) -> Text:
    return Text(
        f"↑ ↓ job   s sort: {sort}   + - scale   p pause/resume   c checkpoint   q quit",
        style="dim",
        no_wrap=True,
        overflow="ellipsis",
    )


def _window(jobs: Sequence[jobs_pb2.Job], selected: str, size: int) -> tuple[int, int]:
    """From which job to which, so that the chosen one is in the middle as far as possible."""
    here = next((place for place, job in enumerate(jobs) if job.name == selected), 0)
    first = max(0, min(here - size // 2, len(jobs) - size))
    return first, min(len(jobs), first + size)


def _table(jobs: Sequence[jobs_pb2.Job], picture: Picture, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", width=width, padding=(0, 1, 0, 0))
    table.add_column("job", ratio=1, no_wrap=True, overflow="ellipsis", min_width=8)
    table.add_column("phase", no_wrap=True, width=9, overflow="ellipsis")
    for heading, columns in (("nodes", 6), ("best", 4), ("S", 4), ("gain", 5), ("tau", 13), ("left", 7)):
        table.add_column(heading, justify="right", no_wrap=True, width=columns, overflow="ellipsis")
    table.add_column("d(tau)/dt", no_wrap=True, width=14)
    rates = picture.rates or {}
    for job in jobs:
        active = sum(1 for node in job.nodes if node.state == "active")
        target = f"/{job.spec.target_tau:.0f}" if job.spec.target_tau else ""
        table.add_row(
            # Text, not markup: names come from other machines.
            Text(job.name),
            Text(job.phase, style=_STYLES.get(job.phase, "yellow")),
            f"{active}/{job.desired_nodes}",
            str(job.recommendation.nodes or "-"),
            f"{job.generation.scale:g}" if job.generation.scale else "-",
            f"{job.progress.gain:.2f}" if job.progress.step else "-",
            f"{job.progress.tau:.0f}{target}" if job.progress.step else "-",
            duration(job.remaining_s),
            Text(f"{job.progress_rate:6.4g} {sparkline(rates.get(job.name, ()), 7)}"),
            style="reverse" if job.name == picture.selected else "",
        )
    if not jobs:
        table.add_row(Text("no jobs", style="dim"))
    return table


def _details(job: jobs_pb2.Job, picture: Picture, width: int) -> list[RenderableType]:
    lines: list[RenderableType] = [_line(f"{job.name}: {job.reason}", "bold")]
    if job.progress.step:
        rates = " ".join(f"{rate:.3g}" for rate in job.progress.effective_lr[:3])
        bases = " ".join(f"{rate:.3g}" for rate in job.progress.base_lr[:3])
        lines.append(
            _line(
                f"step {job.progress.step}   loss {job.progress.loss:.4g}   lr {rates} (base {bases})   "
                f"generation {job.generation.number}"
            )
        )
    lines += _size_lines(job.recommendation)
    saved = job.checkpoint
    if saved.step:
        size = _size(saved.size_bytes)
        lines.append(_line(f"saved step {saved.step}, {size} in {saved.duration_s:.2g} s: {saved.path}"))
    lines += [
        _line(f"  {_clock(event.time_s)} {event.kind.replace('_', ' ')}: {event.reason}", "dim")
        for event in picture.events[-_EVENTS:]
    ]
    for node in job.nodes[:_NODES]:
        heard = f"heard {node.silent_s:.1f} s ago" if node.connected else "not connected"
        rank = f"rank {node.node_rank}" if node.node_rank >= 0 else ""
        slots = f"{node.slots} slot{'s' if node.slots != 1 else ''}"
        text = f"  {node.node_id:<30.30} {node.state:<9} {rank:<8} {slots:<9} {heard}"
        lines.append(_line(text[:width], "" if node.connected else "red"))
    if len(job.nodes) > _NODES:
        lines.append(_line(f"  and {len(job.nodes) - _NODES} more nodes: stretto jobs show {job.name}", "dim"))
    return lines


def _size_lines(recommendation: types_pb2.Recommendation) -> list[RenderableType]:
    """Which size is best and why, and the progress rate that is expected of each."""
    if not recommendation.reason:
        return []
    lines: list[RenderableType] = [_line(recommendation.reason)]
    if recommendation.sizes:
        sizes = "  ".join(
            f"{size.nodes}: {size.progress_rate:.3g}{'' if size.seen else '?'}" for size in recommendation.sizes
        )
        lines.append(_line(f"d(tau)/dt by nodes  {sizes}"))
    return lines


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def _line(text: str, style: str = "") -> Text:
    """Text, not markup: reasons come from other machines."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
