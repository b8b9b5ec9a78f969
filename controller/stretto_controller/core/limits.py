"""Every limit of the core, with its unit, its default and what it costs to change it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    # A forming generation, or a growth, waits this long after the latest join; longer merges more joins.
    settle_s: float = 1.0
    # ... but never longer than this after the first of them.
    settle_limit_s: float = 5.0
    # Nodes send a heartbeat this often.
    heartbeat_interval_s: float = 1.0
    # So many missed in a row, while no step advances, make a node lost.
    missed_heartbeats: int = 3
    # A closed stream that is not opened again within this, while no step advances, makes a node lost. An agent that
    # lives is back after a fraction of it; shorter evicts nodes whose network is reset for a moment.
    closed_stream_s: float = 1.0
    # After a start, or when most of a job's streams close together, nobody is judged by silence for this long.
    recovery_grace_s: float = 15.0
    # ... shortened to this once a member reports failed workers: training has stopped anyway.
    reconnect_grace_s: float = 0.5
    # ... but who lost a stream together with the others has this long to open it again: longer than the longest pause
    # between two attempts (2 s), or healthy nodes are judged lost and have to join anew.
    return_s: float = 2.5
    # Live workers that do not answer a cut within this are lost.
    roll_call_s: float = 0.3
    # ... unless the controller comes to its end later than this: then answers may wait unread, and it lasts as long
    # again, up to what counts as silence at other times.
    late_s: float = 0.1
    # Nodes that could not reach each other are kept apart for this long, and for twice as long each time anew,
    apart_s: float = 15.0
    # ... up to this. All who train pause for a few seconds when they are brought together in vain.
    apart_limit_s: float = 120.0
    # Below min_nodes, survivors keep their state in memory for this long; then they save it and the job fails.
    waiting_limit_s: float = 600.0
    # Live workers that others wait for are named when the wait is longer than so many of a usual step; a larger factor
    # is quieter and later,
    slow_factor: float = 3.0
    # ... and longer than this; below a heartbeat's interval it can say no more.
    slow_least_s: float = 1.0
    # Live workers that others wait for this long are ended by their agent, and start anew. It must be longer than the
    # longest thing that one rank does alone, an evaluation or a compilation.
    hang_limit_s: float = 600.0
    # Live workers have this long to end once the target is reached, the last checkpoint included; then they are ended.
    end_limit_s: float = 1800.0
    # Workers have this long to leave at a step boundary and save (or slow_factor steps, if that is longer); then they
    # are stopped, or cut, all the same.
    leave_limit_s: float = 20.0
    # Live workers have this long to answer a cut by asking for the next generation; then the others go on without them,
    # and they join when they ask. Shorter leaves behind who is in the middle of something that cannot be cut.
    late_limit_s: float = 10.0
    # Agents have this long to stop their workers (torchrun itself waits up to 30 s for them); then they are lost.
    stop_limit_s: float = 45.0
    # A tick that comes later than this after the last one shows that the controller itself was held up.
    stall_s: float = 1.0
    # A size counts as measured after so many steps, the first ones of its generation left out.
    observed_steps: int = 5
    # In mode act, so long between two changes of a job's size; longer is calmer and later,
    resize_interval_s: float = 30.0
    # ... and so long that pauses take at most this share of the time.
    pause_share: float = 0.05
    # Another size must be the better one for this long,
    resize_confirm_s: float = 10.0
    # ... by this share of what is compared: marginal efficiency with its floor, or costs.
    resize_margin: float = 0.15
    # In mode act, a job of one worker, which cannot measure its gradient's noise, is tried with two after so long;
    # shorter sees the noise rise sooner, and pays for a second worker more often.
    remeasure_s: float = 600.0
    # What a change of size is taken to cost until one was measured: live workers, and workers that start anew.
    live_pause_s: float = 1.0
    restart_pause_s: float = 20.0
    # Measured step times are saved at most this often; a crash loses what came since.
    measured_saved_s: float = 60.0
    max_nodes: int = 4096
    max_slots: int = 64

    def validate(self) -> None:
        """Raise ValueError unless every limit is positive."""
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be above 0")
