"""Restart mode, the agent's side: each generation has new workers, with ranks and a master address of their own."""

from __future__ import annotations

import logging

from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStateError, RendezvousStoreInfo

from stretto.rendezvous.attendance import Answer
from stretto.rendezvous.ports import ReservedPort, address_towards
from stretto.rendezvous.settings import AgentSettings
from stretto.rendezvous.store import ExitBarrier, GenerationStore, SharedStores

_log = logging.getLogger(__name__)


class RestartMode:
    """Any script works: it finds its place in torch's own variables."""

    name = "restart"
    reconfigure = types_pb2.RECONFIGURE_MODE_RESTART

    def __init__(self, settings: AgentSettings, node_id: str) -> None:
        self.address = settings.address or address_towards(settings.endpoints[0])
        self._node_id = node_id
        self._shared = SharedStores(settings.job, self.address)
        self._master_port: ReservedPort | None = None
        self._generation = 0

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def environment(self) -> dict[str, str]:
        return {"STRETTO_GENERATION": str(self._generation)}

    def complete(self, ready: pb.NodeReady) -> None:
        if self._master_port is not None:
            self._master_port.close()
        # Fresh each time: a process of the last generation may still hold the old one.
        self._master_port = ReservedPort()
        ready.master_port, ready.store_port = self._master_port.port, self._shared.port

    def enter(self, answer: Answer, slots: int, barrier: ExitBarrier) -> RendezvousInfo:
        assert isinstance(answer, pb.NodeAssignment), "a job of this mode assigns nodes"
        generation = answer.generation
        member = next((m for m in generation.members if m.node_id == self._node_id), None)
        if member is None:
            raise RendezvousStateError(f"generation {generation.number} does not have node {self._node_id}")
        self._generation = generation.number
        if member.node_rank == 0:
            self._shared.serve()
        leader = generation.members[0]
        _log.info(
            "generation %d: node rank %d of %d, workers %d to %d of %d (%s)",
            generation.number,
            member.node_rank,
            answer.node_count,
            member.first_rank,
            member.first_rank + member.slots - 1,
            generation.world_size,
            generation.reason,
        )
        return RendezvousInfo(
            GenerationStore(generation, member, barrier, lambda: self._shared.open(generation, member)),
            member.node_rank,
            answer.node_count,
            RendezvousStoreInfo(leader.address, leader.master_port),
        )

    def watch(self, *, stopping: bool) -> None:
        """Plain scripts owe their agent nothing."""

    def kill_workers(self) -> None:
        """Torch's agent ends workers that do not stop."""

    def objection(self) -> str | None:
        return None

    def close(self) -> None:
        self._shared.close()
        if self._master_port is not None:
            self._master_port.close()
