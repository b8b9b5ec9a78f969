"""In-process mode, the agent's side: it starts workers and supervises them; their places are no business of its own.

torch's agent gets a rendezvous with itself: rank 0 of 1, and a store in its own memory.
"""

from __future__ import annotations

import logging
import time

from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch exports it at run time only
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

from stretto.rendezvous.attendance import Answer
from stretto.rendezvous.ports import address_towards, numeric_address
from stretto.rendezvous.settings import AgentSettings
from stretto.rendezvous.start import WorkerStart
from stretto.rendezvous.store import ExitBarrier, GenerationStore

_log = logging.getLogger(__name__)

# What a script finds that makes a process group from its environment. torch retries an address that it cannot
# resolve until the group's timeout, half an hour by default; a port that is no number it refuses at once, and shows.
# Python shows 200 characters of it.
MASTER_ADDRESS = "this-script-does-not-use-stretto.in-process-mode.invalid"
MASTER_PORT = (
    "none: the job reconfigures in process, but this script does not use stretto for it; use stretto.ElasticTrainer, "
    "or start with --rdzv-conf=reconfigure=restart (stretto run: --reconfigure restart)"
)
ADDRESS_VARIABLE = "STRETTO_ADDRESS"


class InProcessMode:
    """Live workers ask the controller for their places themselves, and change them without this agent."""

    name = "in-process"
    reconfigure = types_pb2.RECONFIGURE_MODE_IN_PROCESS
    generation = 0

    def __init__(self, settings: AgentSettings, node_id: str) -> None:
        self.address = numeric_address(settings.address or address_towards(settings.endpoints[0]))
        self._settings = settings
        self._node_id = node_id
        self._start: WorkerStart | None = None

    @property
    def environment(self) -> dict[str, str]:
        assert self._start is not None, "the controller has let the workers start"
        return {ADDRESS_VARIABLE: self.address, **self._start.environment}

    def complete(self, ready: pb.NodeReady) -> None:
        """Workers say themselves where they can be reached."""
        if self._start is not None:
            self._start.close()

    def enter(self, answer: Answer, slots: int, barrier: ExitBarrier) -> RendezvousInfo:
        assert isinstance(answer, pb.StartWorkers), "a job of this mode lets nodes start workers"
        settings = self._settings
        self._start = WorkerStart(slots, settings.sign_in_warning_s, settings.sign_in_limit_s, now_s=time.monotonic())
        # WORLD_SIZE, until the first assignment: many scripts train alone where it is 1, and would do so on each node.
        generation = types_pb2.Generation(world_size=slots * self._settings.max_nodes)
        member = types_pb2.Member(node_id=self._node_id, slots=slots)
        _log.info("starting %d workers; the controller gives them their places", slots)
        return RendezvousInfo(
            GenerationStore(generation, member, barrier, HashStore),
            rank=0,
            world_size=1,
            bootstrap_store_info=RendezvousStoreInfo(
                MASTER_ADDRESS,
                MASTER_PORT,  # type: ignore[arg-type]  # on purpose no number: torch only copies it to the environment
            ),
        )

    def watch(self, *, stopping: bool) -> None:
        if self._start is not None:
            self._start.watch(stopping=stopping, now_s=time.monotonic())

    def kill_workers(self) -> None:
        if self._start is not None:
            self._start.kill()

    def objection(self) -> str | None:
        return self._start.objection() if self._start is not None else None

    def close(self) -> None:
        if self._start is not None:
            self._start.close()
