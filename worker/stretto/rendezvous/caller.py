"""Who asks for a rendezvous: torch tells a handler nothing about its agent, so the call stack is asked."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from types import FrameType

from torch.distributed.elastic.agent.server.api import RunResult, SimpleElasticAgent


@dataclass(frozen=True, slots=True)
class Caller:
    """The agent that called, as far as it can be known."""

    # Worker processes that it starts; 0 if no torch agent called.
    slots: int = 0
    # The signal that ended the first of its workers that failed; 0 if none did, or it exited by itself.
    exit_signal: int = 0
    is_torch_agent: bool = False


def find_caller() -> Caller:
    """The torch agent in whose call this runs; an empty Caller if there is none.

    `SimpleElasticAgent._invoke_run` calls, through `_rendezvous`, and keeps the workers' last result meanwhile.
    """
    frame: FrameType | None = sys._getframe(1)
    agent: SimpleElasticAgent | None = None
    result: RunResult | None = None
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, SimpleElasticAgent):
            agent = candidate
            if frame.f_code.co_name == "_invoke_run":
                result = frame.f_locals.get("run_result")
                break
        frame = frame.f_back
    if agent is None:
        return Caller()
    slots = agent.get_worker_group().spec.local_world_size
    return Caller(slots, first_exit_signal(result) if result else 0, is_torch_agent=True)


def first_exit_signal(result: RunResult) -> int:
    """The signal that ended the first failed worker; 0 if it exited by itself.

    Failures that torch saw in the same second count as one moment: there, a signal was first, and what exited by
    itself, or by the agent's own SIGTERM, came of it.
    """
    if not result.failures:
        return 0
    first_s = min(failure.timestamp for failure in result.failures.values())
    ends = [int(failure.exitcode) for failure in result.failures.values() if failure.timestamp == first_s]
    signals = [-end for end in ends if end < 0]
    foreign = [number for number in signals if number != signal.SIGTERM]
    if foreign:
        return foreign[0]
    return signals[0] if len(signals) == len(ends) else 0
