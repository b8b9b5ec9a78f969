"""The rendezvous handler of torchrun's `stretto` backend: torch asks, the controller decides."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import re
import secrets
import socket

from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
)

from stretto.errors import Fatal, Retry
from stretto.rendezvous.attendance import Attendance, Dismissal, End
from stretto.rendezvous.caller import Caller, find_caller
from stretto.rendezvous.guardian import MARK_VARIABLE, the_guardian
from stretto.rendezvous.in_process_mode import ADDRESS_VARIABLE, InProcessMode
from stretto.rendezvous.mode import Mode
from stretto.rendezvous.restart_mode import RestartMode
from stretto.rendezvous.settings import AgentSettings
from stretto.rendezvous.sign_in import SIGN_IN_VARIABLE
from stretto.rendezvous.start import START_VARIABLE
from stretto.rendezvous.store import ExitBarrier

_log = logging.getLogger(__name__)

BACKEND = "stretto"
PROTOCOL_VERSION = 1
# A goodbye that the controller has not taken by then is given up; it notices the closed stream anyway.
_GOODBYE_TIMEOUT_S = 2.0
_NODE_VARIABLE = "STRETTO_NODE"
_OF_ONE_MODE = ("STRETTO_GENERATION", ADDRESS_VARIABLE, SIGN_IN_VARIABLE, START_VARIABLE)


class StrettoHandler(RendezvousHandler):
    """One node of one job. Its stream to the controller opens at the first `next_rendezvous` and stays."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._node_id = node_name()
        in_process = settings.reconfigure == InProcessMode.name
        self._mode: Mode = (InProcessMode if in_process else RestartMode)(settings, self._node_id)
        self._requests = itertools.count(1)
        self._attendance: Attendance | None = None
        self._has_run = False
        self._holds_guardian = False
        self._succeeded = False
        self._objection: str | None = None
        self._closed = False
        # What an agent of ours knows beyond torch's: how many failures of their own its workers may still have.
        self.restarts_left = -1
        # The failure that ended the last generation was this node's own.
        self.at_fault = False
        # Torch's own agent meets RendezvousGracefulExitError with an AttributeError and exit code 1.
        self.exits_process = True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._settings.run_id

    @property
    def use_agent_store(self) -> bool:
        return False

    @property
    def generation(self) -> int:
        """The generation that this node's workers last ran in; 0 before the first, and in in-process mode."""
        return self._mode.generation

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        """Torch's agents call this when they are stopped for good: this node takes part no longer."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """1 when the workers are to be stopped, for whatever reason: that makes torch's agent ask again."""
        stopping = self._attendance is not None and self._attendance.must_stop
        self._mode.watch(stopping=stopping)
        return int(stopping)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this node may start workers: for its place in the next generation, in restart mode.

        Raises RendezvousGracefulExitError when the node is to end well (torch's own agent, which would crash on
        it, gets SystemExit(0) instead), RendezvousClosedError when the controller refuses or dismisses it, and
        RendezvousConnectionError when no controller can be reached.
        """
        if self._closed:
            raise RendezvousClosedError(f"node {self._node_id} has left job {self._settings.job}")
        caller = find_caller()
        attendance = self._attend(caller)
        ready = self._make_ready(attendance, caller)
        try:
            answer = attendance.ask(ready, self._settings.join_timeout_s)
        except Dismissal as dismissal:
            raise self._goodbye(dismissal, caller) from None
        except Fatal as error:
            raise RendezvousClosedError(f"the controller refuses node {self._node_id}: {error}") from error
        except Retry as error:
            raise RendezvousConnectionError(str(error)) from error
        self._has_run = True
        self.at_fault = answer.at_fault
        info = self._mode.enter(answer, self._slots(caller), self._barrier(attendance))
        self._guard()
        self._describe()
        return info

    def shutdown(self) -> bool:
        """Say goodbye to the controller, and close everything."""
        reason = pb.LEAVE_REASON_SUCCEEDED if self._succeeded else pb.LEAVE_REASON_FAILED
        message = "" if self._succeeded else self._objection or "its agent gave up"
        self.leave(reason, message)
        if self._holds_guardian:
            self._holds_guardian = False
            the_guardian().release()
        return True

    def leave(self, reason: pb.LeaveReason.ValueType, message: str = "") -> None:
        """End this node's part, for `reason`, unless it has ended already. The workers must be gone."""
        self._closed = True
        if self._attendance is not None:
            self._attendance.leave(reason, message, _GOODBYE_TIMEOUT_S)
        self._mode.close()
        atexit.unregister(self._at_exit)

    def _attend(self, caller: Caller) -> Attendance:
        if self._attendance is None:
            spec = types_pb2.JobSpec(
                min_nodes=self._settings.min_nodes,
                max_nodes=self._settings.max_nodes,
                mode=self._mode.reconfigure,
            )
            hello = pb.NodeHello(
                protocol_version=PROTOCOL_VERSION,
                job=self._settings.job,
                node_id=self._node_id,
                node_key=secrets.token_hex(16),
                slots=self._slots(caller),
                address=self._mode.address,
                spec=spec,
            )
            self._attendance = Attendance(self._settings.endpoints, hello, on_force=self._mode.kill_workers)
            atexit.register(self._at_exit)
        return self._attendance

    def _slots(self, caller: Caller) -> int:
        asked = self._settings.slots
        if asked and caller.slots and asked != caller.slots:
            raise ValueError(
                f"--rdzv-conf=slots={asked}, but torch's agent starts {caller.slots} workers; leave slots out"
            )
        return asked or caller.slots or 1

    def _make_ready(self, attendance: Attendance, caller: Caller) -> pb.NodeReady:
        """A fresh request. Torch's agents come here either because they were told to, or because workers failed."""
        failed = self._has_run and not attendance.must_stop
        ready = pb.NodeReady(
            request_id=next(self._requests),
            generation=self._mode.generation,
            failed=failed,
            exit_signal=caller.exit_signal if failed else 0,
            restarts_left=self.restarts_left,
        )
        self._mode.complete(ready)
        return ready

    def _barrier(self, attendance: Attendance) -> ExitBarrier:
        def succeed() -> None:
            self._objection = self._mode.objection()
            if self._objection:
                _log.error("this node's workers exited with 0, but did not take part: %s", self._objection)
                # Torch's agent takes any Exception here for a trifle, and ends with 0.
                raise SystemExit(1)
            self._succeeded = True
            attendance.succeed(self._mode.generation)

        return ExitBarrier(succeed, lambda timeout_s: attendance.wait_for_end(timeout_s) is not End.TIMEOUT)

    def _guard(self) -> None:
        """Workers start soon: see that they end with this process."""
        if self._holds_guardian:
            the_guardian().ensure()
        else:
            the_guardian().hold()
            self._holds_guardian = True

    def _describe(self) -> None:
        """Tell the workers, through the environment that they inherit, who they are."""
        for name in _OF_ONE_MODE:
            # Another agent's, whose worker started this one.
            os.environ.pop(name, None)
        os.environ.update(
            {
                "STRETTO_ENDPOINT": ",".join(self._settings.endpoints),
                "STRETTO_JOB": self._settings.job,
                _NODE_VARIABLE: self._node_id,
                "STRETTO_MODE": self._mode.name,
                "STRETTO_AGENT_PID": str(os.getpid()),
                MARK_VARIABLE: the_guardian().mark,
                **self._mode.environment,
            }
        )

    def _goodbye(self, dismissal: Dismissal, caller: Caller) -> BaseException:
        if not dismissal.success:
            return RendezvousClosedError(f"node {self._node_id} was dismissed: {dismissal.reason}")
        self._succeeded = True
        _log.info("node %s ends: %s", self._node_id, dismissal.reason)
        if self.exits_process and caller.is_torch_agent:
            return SystemExit(0)
        return RendezvousGracefulExitError(dismissal.reason)

    def _at_exit(self) -> None:
        """Torch's launcher does not call `shutdown` when a signal ends the agent: its node drains."""
        self.leave(pb.LEAVE_REASON_DRAIN, "its agent was asked to end")


def node_name() -> str:
    """STRETTO_NODE, or a DNS label made of this machine's name that is unique to the caller.

    An agent started by a worker finds its parent's name in the environment, beside the parent's mark.
    """
    given = os.environ.get(_NODE_VARIABLE)
    if given and MARK_VARIABLE not in os.environ:
        return given
    host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")[:32].strip("-") or "node"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
