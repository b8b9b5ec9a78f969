"""The table phase x event: what each fact does where. docs/protocol.md's tables are drawn from here.

`take`: the fact is recorded, and `reconsider` draws the consequences. `ignore`: it comes too late to matter.
`refuse`: the sender gets an error. `again`: a finished name begins a new incarnation.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from stretto_controller.core import events as ev
from stretto_controller.core.model import FINISHED, Phase


class Treatment(StrEnum):
    TAKE = "take"
    IGNORE = "ignore"
    REFUSE = "refuse"
    AGAIN = "again"


_UNFINISHED = (Phase.PENDING, Phase.FORMING, Phase.RUNNING, Phase.RECONFIGURING, Phase.WAITING, Phase.PAUSED)


def _row(unfinished: Treatment, finished: Treatment) -> Mapping[Phase, Treatment]:
    return {phase: finished if phase in FINISHED else unfinished for phase in (*_UNFINISHED, *FINISHED)}


TABLE: Mapping[type, Mapping[Phase, Treatment]] = {
    ev.JobCreated: _row(Treatment.TAKE, Treatment.AGAIN),
    ev.NodeHello: _row(Treatment.TAKE, Treatment.AGAIN),
    ev.NodeHeartbeat: _row(Treatment.TAKE, Treatment.TAKE),
    ev.NodeReady: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.NodeSucceeded: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.NodeLeft: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.StreamClosed: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.WorkerHello: _row(Treatment.TAKE, Treatment.TAKE),
    ev.WorkerStreamClosed: _row(Treatment.TAKE, Treatment.TAKE),
    ev.WorkerAlive: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.WorkerAsked: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.WorkerProgressed: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.WorkerLeft: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.WorkerFinished: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.WorkerDraining: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.CheckpointCommitted: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.CheckpointFailed: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.ScaleRequested: _row(Treatment.TAKE, Treatment.REFUSE),
    ev.AutoscaleRequested: _row(Treatment.TAKE, Treatment.REFUSE),
    ev.SizeReviewed: _row(Treatment.TAKE, Treatment.IGNORE),
    ev.PauseRequested: _row(Treatment.TAKE, Treatment.REFUSE),
    ev.ResumeRequested: _row(Treatment.TAKE, Treatment.REFUSE),
    ev.DrainRequested: _row(Treatment.TAKE, Treatment.REFUSE),
    ev.CheckpointRequested: _row(Treatment.TAKE, Treatment.REFUSE),
    ev.DeleteRequested: _row(Treatment.TAKE, Treatment.TAKE),
    ev.Recovered: _row(Treatment.TAKE, Treatment.TAKE),
    ev.Tick: _row(Treatment.TAKE, Treatment.TAKE),
}

# Where each phase can lead; `step` asserts it, the diagram shows it.
NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.PENDING: frozenset({Phase.FORMING, Phase.RUNNING, Phase.PAUSED, Phase.WAITING, Phase.FAILED}),
    Phase.FORMING: frozenset({Phase.PENDING, Phase.RUNNING, Phase.PAUSED, Phase.WAITING, Phase.FAILED}),
    Phase.RUNNING: frozenset({Phase.RECONFIGURING, Phase.PENDING, Phase.SUCCEEDED, Phase.FAILED}),
    Phase.RECONFIGURING: frozenset(
        {Phase.RUNNING, Phase.WAITING, Phase.PENDING, Phase.PAUSED, Phase.SUCCEEDED, Phase.FAILED}
    ),
    Phase.PAUSED: frozenset({Phase.PENDING, Phase.FORMING, Phase.RUNNING, Phase.WAITING, Phase.FAILED}),
    Phase.WAITING: frozenset({Phase.RUNNING, Phase.PENDING, Phase.PAUSED, Phase.FAILED}),
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset(),
}


def diagram() -> str:
    """The phases as a Mermaid state diagram, for the docs."""
    lines = ["stateDiagram-v2", "    [*] --> pending"]
    for phase, targets in NEXT.items():
        lines += [f"    {phase} --> {target}" for target in sorted(targets)]
        if not targets:
            lines.append(f"    {phase} --> [*]")
    return "\n".join(lines)


def table() -> str:
    """The treatment of each event in each phase as a Markdown table, for the docs."""
    phases = (*_UNFINISHED, *FINISHED)
    rows = ["| event | " + " | ".join(phases) + " |", "|---" * (len(phases) + 1) + "|"]
    rows += [
        f"| {event.__name__} | " + " | ".join(row[phase] for phase in phases) + " |" for event, row in TABLE.items()
    ]
    return "\n".join(rows)
