"""The report's page: from what is known of a run to HTML. Pure; every text from elsewhere is escaped."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape

from stretto_proto.v1 import jobs_pb2

from stretto.report.charts import Line, chart, duration, number
from stretto.report.run import Run

_STYLE = """
:root { color-scheme: light dark; --ink: #18202c; --dim: #5a6577; --line: #dfe4ec; --ground: #fff;
  --c0: #2563c9; --c1: #b0451b; --mark: #b7791f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf3; --dim: #9aa7bc; --line: #2b3443; --ground: #10141b;
  --c0: #7aaeff; --c1: #ff9e6d; --mark: #d9a441; } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1320px;
  margin: 0 auto; padding: 1rem 1.5rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.dim, figcaption, th, text { color: var(--dim); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; min-width: 0; }
figcaption b { color: var(--ink); margin-right: .6rem; } svg { width: 100%; height: auto; display: block; }
text { fill: var(--dim); font-size: 11px; } .grid { stroke: var(--line); }
.line { fill: none; } .line:not([stroke-width]) { stroke-width: 1.8; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); }
span.c0 { color: var(--c0); } span.c1 { color: var(--c1); }
.mark { stroke: var(--mark); stroke-dasharray: 3 4; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } .scroll { overflow: auto; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
"""


def page(run: Run) -> str:
    """One self-contained HTML page: no script, nothing from elsewhere."""
    name = escape(run.job.name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} · Stretto report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{name}</h1>\n{_summary(run)}\n"
        f'<h2>Training</h2>\n<div class="charts">{_charts(run)}</div>\n'
        f"<h2>Generations</h2>\n{_generations(run.generations)}\n<h2>Events</h2>\n{_events(run.events)}\n"
        f'<p class="dim">As told by {escape(run.source)}.</p>\n</body>\n</html>\n'
    )


def _summary(run: Run) -> str:
    job, generations, times_s = run.job, run.generations, run.points.time_s
    target = f" of {number(job.spec.target_tau)}" if job.spec.target_tau else ""
    pauses_s = [each.pause_s for each in generations[1:] if math.isfinite(each.pause_s)]
    paused = f", paused for {duration(sum(pauses_s))} in all" if pauses_s else ""
    facts = [
        f"{job.phase}: {job.reason}" if job.reason else job.phase,
        f"tau {number(job.progress.tau)}{target} after {job.progress.step:,} steps",
        f"{len(generations)} generation{'s' if len(generations) != 1 else ''}{paused}",
    ]
    if len(times_s) > 1:
        facts.append(f"{duration(times_s[-1] - times_s[0])} from the first point to the last")
    return "".join(f'<p class="dim">{escape(fact)}</p>' for fact in facts)


def _charts(run: Run) -> str:
    job, points = run.job, run.points
    if not points.time_s:
        return "<p>No point was reported.</p>"
    begin_s = points.time_s[0]
    times_s = [time_s - begin_s for time_s in points.time_s]
    marks_s = [g.started_s - begin_s for g in run.generations if begin_s < g.started_s <= points.time_s[-1]]
    tau = [Line("tau", points.tau)]
    if job.spec.target_tau:
        tau.append(Line("target", [job.spec.target_tau] * len(times_s), dashed=True))
    return "".join(
        chart(title, times_s, lines, marks_s)
        for title, lines in (
            ("tau", tau),
            ("Gain r and scale S", [Line("gain r", points.gain), Line("scale S", points.scale, stepped=True)]),
            ("Learning rate", [Line("effective", points.effective_lr), Line("base", points.base_lr)]),
            ("Loss", [Line("loss", points.loss)]),
            ("d(tau)/dt", [Line("iterations/s", points.progress_rate)]),
        )
    )


def _generations(generations: Sequence[jobs_pb2.GenerationSummary]) -> str:
    rows = [
        [
            str(g.generation.number),
            _clock(g.started_s),
            str(len(g.generation.members) or "-"),
            str(g.generation.world_size or "-"),
            number(g.generation.scale),
            number(g.mean_gain),
            number(g.effective_lr),
            f"{g.steps:,}",
            f"{number(g.first_tau)} → {number(g.last_tau)}",
            duration(g.pause_s) if math.isfinite(g.pause_s) else "-",
            g.end_reason or "-",
        ]
        for g in generations
    ]
    figures = ["S", "mean gain", "effective lr", "steps", "tau", "pause", "ended by"]
    return _table(["number", "began", "nodes", "workers", *figures], rows)


def _events(events: Sequence[jobs_pb2.Event]) -> str:
    rows = [[_clock(e.time_s), e.kind.replace("_", " "), str(e.generation or ""), e.reason] for e in events]
    return _table(["time", "event", "generation", "reason"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _clock(seconds: float) -> str:
    """0: nobody knows when."""
    if not seconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
