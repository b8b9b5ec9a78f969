"""What a person sees of the demonstration: events as they come, and below them the job as it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from stretto_proto.v1 import jobs_pb2

from stretto.commands.job_tables import nodes_table

_PLAIN_INTERVAL_S = 5.0
# The steps on the way to what `running` tells, and what the story itself has just said.
_UNTOLD = frozenset(
    (
        *("pending", "forming", "change_planned", "reconfiguring", "generation_broken"),
        *("scale_requested", "node_draining", "node_succeeded", "checkpoint_committed"),
    )
)


class Screen:
    """A live view on a terminal; lines only where `plain` is set or output goes elsewhere."""

    def __init__(self, console: Console, *, plain: bool, target_tau: float) -> None:
        self._console = console
        self._plain = plain or not console.is_terminal
        self._began_s = time.monotonic()
        self._shown_s = self._began_s
        self._bar = Progress(TextColumn("tau"), BarColumn(bar_width=None), TaskProgressColumn(), console=console)
        self._task = self._bar.add_task("", total=target_tau)
        self._live = Live(self._bar, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Screen:
        if not self._plain:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._plain:
            self._live.stop()

    def tell(self, text: str) -> None:
        """What the demonstration does itself."""
        self._line(f"[bold]{escape(text)}[/]")

    def warn(self, text: str) -> None:
        self._line(f"[bold yellow]{escape(text)}[/]")

    def event(self, event: jobs_pb2.Event) -> None:
        """What the controller says has happened, and why, as far as a spectator cares."""
        if event.kind not in _UNTOLD:
            self._line(f"[cyan]{event.kind}[/]: {escape(event.reason)}")

    def show(self, job: jobs_pb2.Job) -> None:
        """The job as it is now."""
        text = _figures(job)
        # A controller that has just been started again has not heard of progress yet.
        tau = job.progress.tau or job.checkpoint.tau
        self._bar.update(self._task, completed=tau)
        if not self._plain:
            self._live.update(Group(self._bar, text, nodes_table(job.nodes)))
        elif time.monotonic() - self._shown_s >= _PLAIN_INTERVAL_S:
            self._shown_s = time.monotonic()
            states = ", ".join(f"{node.node_id} {node.state}" for node in job.nodes)
            self._line(f"{text}; {states}")

    def _line(self, markup: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._began_s:6.1f} s[/]  {markup}", highlight=False)


def _figures(job: jobs_pb2.Job) -> str:
    progress = job.progress
    if not progress.step:
        return job.phase
    rate = progress.effective_lr[0] if progress.effective_lr else 0.0
    saved = f", saved at step {job.checkpoint.step}" if job.checkpoint.step else ""
    return (
        f"{job.phase}, generation {job.generation.number}, S {job.generation.scale:g}, gain {progress.gain:.2f}, "
        f"lr {rate:.4f}, loss {progress.loss:.3f}, step {progress.step}, tau {progress.tau:.0f} of "
        f"{job.spec.target_tau:.0f}{saved}"
    )


def summary_table(summaries: Sequence[jobs_pb2.GenerationSummary]) -> Table:
    """One row per generation, at the end."""
    table = Table(title="Generations", title_justify="left")
    for name in ("generation", "members", "S", "mean gain", "effective lr", "steps", "tau", "paused", "ended by"):
        table.add_column(name, justify="left" if name == "ended by" else "right", overflow="fold")
    for summary in summaries:
        generation = summary.generation
        table.add_row(
            str(generation.number),
            str(len(generation.members)),
            f"{generation.scale:g}",
            f"{summary.mean_gain:.2f}",
            f"{summary.effective_lr:.4f}",
            str(summary.steps),
            f"{summary.first_tau:.0f} → {summary.last_tau:.0f}",
            f"{summary.pause_s:.1f} s",
            summary.end_reason,
        )
    return table
