"""The agent of `stretto run`: torch's own, except that the controller says whose failure a failure was.

torch's agent counts a worker's crash against --max-restarts before it asks anyone, also where the crash only came
of another node's death. This one asks first.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import FrameType
from typing import Any

from stretto_proto.v1 import rendezvous_pb2 as pb
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig

from stretto.rendezvous.handler import BACKEND, StrettoHandler
from stretto.rendezvous.settings import AgentSettings

_log = logging.getLogger(__name__)


class StrettoAgent(LocalElasticAgent):
    """One node's agent. --max-restarts limits the failures of this node's own workers, and no others."""

    def __init__(self, handler: StrettoHandler, spec: WorkerSpec, **options: Any) -> None:
        """options: as for torch's LocalElasticAgent."""
        super().__init__(spec, **options)
        self._handler = handler
        # `run` ends well on RendezvousGracefulExitError, and `launch` below knows what that means.
        handler.exits_process = False

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        group = self._worker_group
        self._initialize_workers(group)
        while True:
            time.sleep(group.spec.monitor_interval)
            # The handler finds the name run_result in this frame, as it does in torch's.
            run_result: RunResult = self._monitor_workers(group)
            group.state = run_result.state
            if run_result.state is WorkerState.SUCCEEDED:
                self._exit_barrier()  # type: ignore[no-untyped-call]  # torch's
                return run_result
            if run_result.state in (WorkerState.UNHEALTHY, WorkerState.FAILED):
                if not self._may_go_on(group):
                    return run_result
            elif run_result.state is not WorkerState.HEALTHY:
                raise RuntimeError(
                    f"the workers are in the state {run_result.state.name}, which torch does not explain"
                )
            elif self._handler.num_nodes_waiting() > 0:
                self._restart_workers(group)

    def _may_go_on(self, group: WorkerGroup) -> bool:
        """Workers failed: ask the controller for a place in the next generation. False: there is none for this node."""
        try:
            self._restart_workers(group)
        except RendezvousClosedError as error:
            _log.error("%s", error)
            group.state = WorkerState.FAILED
            return False
        return True

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._handler.restarts_left = self._remaining_restarts
        super()._rendezvous(worker_group)
        if self._handler.at_fault:
            self._remaining_restarts -= 1
            _log.warning(
                "this node's workers failed: %d of %d restarts left",
                self._remaining_restarts,
                worker_group.spec.max_restarts,
            )


@record
def launch(config: LaunchConfig, entrypoint: Callable[..., Any] | str, args: Sequence[Any], *, owns_job: bool) -> int:
    """Run one node of a job to its end, and return the exit code; what torchrun's `launch_agent` does.

    owns_job: a signal ends the job, rather than only draining this node.
    Raises ChildFailedError when this node's workers failed for good, RendezvousError when it gets no place.
    """
    params = RendezvousParameters(
        BACKEND,
        config.rdzv_endpoint,
        config.run_id,
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **config.rdzv_configs,
    )
    handler = StrettoHandler(AgentSettings.from_parameters(params))
    agent = _make_agent(handler, config, entrypoint, args)
    _raise_on_signals(config.signals_to_handle)
    try:
        result = agent.run()
    except SignalException as error:
        # The workers had the signal, and their time. Any that are left end with this process, by the guardian.
        if owns_job:
            handler.leave(pb.LEAVE_REASON_FAILED, f"stopped by {error.sigval.name}")
        else:
            handler.leave(pb.LEAVE_REASON_DRAIN, f"its agent had {error.sigval.name}")
        return 0 if error.sigval == signal.SIGTERM else 128 + error.sigval
    except BaseException:
        handler.shutdown()
        raise
    handler.shutdown()
    if result is not None and result.is_failed():
        script = next((str(arg) for arg in args if not str(arg).startswith("-")), str(entrypoint))
        raise ChildFailedError(name=script, failures=result.failures)
    return 0


def _make_agent(
    handler: StrettoHandler, config: LaunchConfig, entrypoint: Callable[..., Any] | str, args: Sequence[Any]
) -> StrettoAgent:
    """What torch's launcher would make of `config`: options come and go with its versions, so all that fit go in."""
    spec_names = {field.name for field in fields(WorkerSpec)}
    spec = WorkerSpec(
        local_world_size=config.nproc_per_node,
        rdzv_handler=handler,
        entrypoint=entrypoint,
        args=tuple(args),
        **{field.name: getattr(config, field.name) for field in fields(config) if field.name in spec_names},
    )
    option_names = inspect.signature(LocalElasticAgent).parameters
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name in option_names}
    return StrettoAgent(handler, spec, **options)


def _raise_on_signals(names: str) -> None:
    """Torch's agent does this itself, but only when it starts workers: a node may have to wait before."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names
    for name in names.split(","):
        signal.signal(signal.Signals[name.strip()], _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    sigval = signal.Signals(number)
    raise SignalException(f"the agent had {sigval.name}", sigval=sigval)
