"""One node's agent: torch's own with our rendezvous in in-process mode. It starts workers and looks after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simulation.links import AGENT_BACKOFF_S, Stream
from simulation.simulated_controller import JOB
from simulation.worker import Worker
from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1 import types_pb2

if TYPE_CHECKING:
    from simulation.world import World

MONITOR_INTERVAL_S = 0.1
# From SIGTERM to SIGKILL.
STOP_GRACE_S = 30.0


class Agent:
    """From its start to its exit. `exit_code` None: it lives, or was killed."""

    def __init__(self, world: World, node_id: str, key: str, slots: int) -> None:
        world.agents_started += 1
        self.world = world
        self.node_id = node_id
        self.key = f"{key}-is-the-key-of-this-agent"
        self.slots = slots
        self.name = f"{node_id}/agent{world.agents_started}"
        self.alive = True
        self.frozen = False
        self.exit_code: int | None = None
        self.workers: list[Worker] = []
        self.stream = Stream(world, self, AGENT_BACKOFF_S)
        self._ready: pb.NodeReady | None = None
        self._request = 0
        self._has_run = False
        self._present = False
        # The workers that run are to be stopped.
        self._halted = False
        self._stopping = False
        self._dismissed: pb.NodeDismissed | None = None
        self._refused = False
        self._succeeded = self._finished = False
        self._terminated = False
        self._leave: pb.NodeLeave | None = None
        self._beating = False
        self._restarts_left = world.setup.restarts
        self._looking = False

    def start(self) -> None:
        self.world.say(self.name, "starts")
        self._ask()
        self.stream.start()

    # -- what happens to it

    def kill(self, *, silently: bool = False) -> None:
        """kill -9, or its machine loses power: its workers end with it."""
        if not self.alive:
            return
        self.world.say(self.name, "is killed%s", ", its machine too" if silently else "")
        self.alive = False
        self.stream.die(silently=silently)
        for worker in self.workers:
            worker.kill(silently=silently)
        self.world.agent_ended(self)

    @property
    def leaving(self) -> bool:
        """It is on its way out."""
        return self._terminated or self._refused or self._dismissed is not None

    def freeze(self) -> None:
        self.world.say(self.name, "is frozen")
        self.frozen = True

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.world.say(self.name, "is thawed")
        self.frozen = False
        if self.stream.connection is not None:
            self.stream.connection.release()

    def sigterm(self) -> None:
        """The node is to go: its workers are told, and have their time."""
        if not self.alive or self._terminated:
            return
        self.world.say(self.name, "has SIGTERM")
        self._terminated = True
        self._stop_workers()
        self._look_soon()

    def worker_ended(self, worker: Worker) -> None:
        """The kernel tells; the agent looks at its next interval."""
        if self.alive and worker in self.workers:
            self._look_soon()

    # -- its conversation

    def opening(self) -> Sequence[pb.AttendRequest]:
        setup = self.world.setup
        hello = pb.NodeHello(
            protocol_version=1,
            job=JOB,
            node_id=self.node_id,
            node_key=self.key,
            slots=self.slots,
            address="10.0.0.1",
            spec=types_pb2.JobSpec(
                min_nodes=setup.min_nodes,
                max_nodes=setup.max_nodes,
                mode=types_pb2.RECONFIGURE_MODE_IN_PROCESS,
            ),
            ready=None if self._present else self._ready,
        )
        messages = [pb.AttendRequest(hello=hello)]
        if self._succeeded:
            messages.append(pb.AttendRequest(succeeded=pb.NodeSucceeded()))
        if self._leave is not None:
            messages.append(pb.AttendRequest(leave=self._leave))
        return messages

    def said_again(self) -> Sequence[pb.AttendRequest]:
        return [] if self._present else [pb.AttendRequest(ready=self._ready)]

    def hear(self, message: Any) -> None:
        kind = message.WhichOneof("body")
        if kind == "welcome":
            if not self._beating:
                self._beating = True
                self._beat()
            return
        self.world.say(self.name, "hears %s", message)
        if kind == "start_workers":
            answered = self._ready is not None and message.start_workers.request_id == self._ready.request_id
            if answered and not self._present:
                self._present = True
                self.world.scheduler.after(self.world.rng.uniform(0.02, 0.3), self._start_workers)
        elif kind == "stop_workers" and self._present:
            self._halted = True
            if message.stop_workers.force:
                for worker in self.workers:
                    self.world.scheduler.after(self.world.rng.uniform(0.0, 0.15), worker.kill)
        elif kind == "generation_finished":
            self._finished = True
        elif kind == "dismissed":
            self._dismissed = message.dismissed
            self.stream.close()
        self._look_soon()

    def refused(self, reason: str) -> None:
        self.world.say(self.name, "is refused: %s", reason)
        self._refused = True
        self._look_soon()

    def connection_lost(self) -> None:
        pass

    def _beat(self) -> None:
        if not self.alive or self.stream.closed:
            return
        if not self.frozen:
            self.stream.send(_HEARTBEAT)
        self.world.scheduler.after(self.world.setup.limits.heartbeat_interval_s, self._beat)

    # -- its workers

    @property
    def _must_stop(self) -> bool:
        return self._halted or self._refused or self._dismissed is not None

    def _ask(self) -> None:
        """No worker runs: ask the controller whether to start some."""
        self._request += 1
        failed = self._has_run and not self._must_stop
        signals = [worker.exit_code for worker in self.workers if worker.exit_code and worker.exit_code < 0]
        self._ready = pb.NodeReady(
            request_id=self._request,
            failed=failed,
            exit_signal=-signals[0] if failed and signals else 0,
            restarts_left=self._restarts_left,
        )
        if failed and self._restarts_left > 0:
            self._restarts_left -= 1
        self.workers = []
        self._present = self._halted = self._stopping = False
        self.stream.send(pb.AttendRequest(ready=self._ready))

    def _start_workers(self) -> None:
        if not self.alive or self._terminated:
            return
        self._has_run = True
        self.workers = [Worker(self.world, self, rank) for rank in range(self.slots)]
        self._look_soon()

    def _stop_workers(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        for worker in self.workers:
            worker.sigterm()
            self.world.scheduler.after(STOP_GRACE_S, worker.kill)

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            self.world.scheduler.after(self.world.rng.uniform(0.0, MONITOR_INTERVAL_S), self._look)

    def _look(self) -> None:
        """What torch's agent does each monitor interval."""
        self._looking = False
        if not self.alive:
            return
        if self.frozen:
            self._look_soon()
            return
        running = [worker for worker in self.workers if worker.alive]
        if self._terminated:
            if not running:
                self._say_goodbye(pb.LEAVE_REASON_DRAIN)
        elif self._must_stop or any(worker.exit_code for worker in self.workers):
            self._stop_workers()
            if not running:
                self._ask_or_end()
        elif self.workers and not running and not self._succeeded:
            self._succeeded = True
            self.world.say(self.name, "has done its part")
            self.stream.send(pb.AttendRequest(succeeded=pb.NodeSucceeded()))
        if self._succeeded and self._finished:
            self._exit(0)

    def _ask_or_end(self) -> None:
        if self._dismissed is not None:
            self._exit(0 if self._dismissed.success else 1)
        elif self._refused:
            self._exit(1)
        elif self._succeeded:
            self._say_goodbye(pb.LEAVE_REASON_SUCCEEDED)
        else:
            self._ask()

    def _say_goodbye(self, reason: pb.LeaveReason.ValueType) -> None:
        if self._dismissed is None and not self._refused:
            self._leave = pb.NodeLeave(reason=reason)
            self.stream.send(pb.AttendRequest(leave=self._leave))
        self._exit(0)

    def _exit(self, code: int) -> None:
        if not self.alive:
            return
        self.world.say(self.name, "exits with %d", code)
        self.alive = False
        self.exit_code = code
        self.stream.close()
        for worker in self.workers:
            worker.kill()
        self.world.agent_ended(self)


_HEARTBEAT = pb.AttendRequest(heartbeat=pb.NodeHeartbeat())
