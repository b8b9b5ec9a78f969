"""Agents of one job in restart mode: they keep a stream open, ask, are assigned, stop, and ask again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from simulation.cluster.process import Call
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import types_pb2 as types

if TYPE_CHECKING:
    from simulation.cluster.world import World

JOB = "training"
# A controller that does not greet within this is given up for another.
_GREETING_LIMIT_S = 2.0
_HEARTBEAT_S = 1.0
# A stream on which nothing was heard for so long after something was sent is opened anew, as keepalive would.
_PAUSE_S = 0.4


class Node:
    """One agent. It knows every controller, and follows the leader's address where a follower tells it."""

    def __init__(self, world: World, node_id: str) -> None:
        self.world, self.node_id = world, node_id
        self.alive = True
        self.request_id, self.generation, self.answered = 1, 0, False
        self.failed = False
        self.welcomed = False
        self._target = world.rng.randrange(len(world.processes))
        self._call: Call | None = None
        self._attempt = 0
        self.connect()
        world.scheduler.after(world.rng.random() * _HEARTBEAT_S, self._beat)

    # -- its stream

    def connect(self) -> None:
        if not self.alive:
            return
        process = self.world.processes[self._target]
        self.welcomed = False
        self._attempt += 1
        self._call = Call(process, self._hear, self._ended)
        self._call.open(process.attend)
        self._call.send(rendezvous.AttendRequest(hello=self._hello()))
        self.world.scheduler.after(_GREETING_LIMIT_S, self._greeted_in_time, self._attempt)

    def break_stream(self) -> None:
        """Its network drops the connection."""
        if self._call is not None:
            self._call.close()
            self._try_another("")

    def _greeted_in_time(self, attempt: int) -> None:
        if attempt == self._attempt and not self.welcomed:
            self.break_stream()

    def _ended(self, code: grpc.StatusCode, leader: str) -> None:
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.OK), (
            f"{self.node_id} was refused for good: {code}"
        )
        self._try_another(leader)

    def _try_another(self, leader: str) -> None:
        self._call = None
        self._attempt += 1
        processes = self.world.processes
        known = [process.number for process in processes if process.address == leader]
        self._target = known[0] if known else (self._target + 1) % len(processes)
        self.world.scheduler.after(self.world.rng.random() * _PAUSE_S, self._reconnect, self._attempt)

    def _reconnect(self, attempt: int) -> None:
        if attempt == self._attempt:
            self.connect()

    def _beat(self) -> None:
        if not self.alive:
            return
        if self.welcomed:
            self._say(heartbeat=rendezvous.NodeHeartbeat(generation=self.generation))
            process = self.world.processes[self._target]
            # What keepalive notices in reality, sooner or later.
            if (process.cut_off or process.frozen) and self.world.rng.random() < 0.4:
                self.break_stream()
        self.world.scheduler.after(_HEARTBEAT_S, self._beat)

    # -- what it says and hears

    def ask(self, *, failed: bool = False) -> None:
        """Its workers have ended: a new generation, please."""
        if self.alive and self.answered:
            self.request_id += 1
            self.answered, self.failed = False, failed
            self._say(ready=self._ready())

    def leave(self) -> None:
        """The machine is gone."""
        self.alive = False
        if self._call is not None:
            self._call.close()

    def _say(self, **body: Any) -> None:
        if self._call is not None:
            self._call.send(rendezvous.AttendRequest(**body))

    def _hello(self) -> rendezvous.NodeHello:
        setup = self.world.setup
        hello = rendezvous.NodeHello(
            protocol_version=1,
            job=JOB,
            node_id=self.node_id,
            node_key=f"the-secret-key-of-{self.node_id}",
            slots=1,
            address="10.0.0.1",
            spec=types.JobSpec(
                min_nodes=setup.min_nodes, max_nodes=setup.max_nodes, mode=types.RECONFIGURE_MODE_RESTART
            ),
            generation=self.generation if self.answered else 0,
        )
        if not self.answered:
            hello.ready.CopyFrom(self._ready())
        return hello

    def _ready(self) -> rendezvous.NodeReady:
        return rendezvous.NodeReady(
            request_id=self.request_id, generation=self.generation, failed=self.failed, restarts_left=-1
        )

    def _hear(self, message: rendezvous.AttendResponse) -> None:
        kind = message.WhichOneof("body")
        if not self.alive:
            return
        if kind == "welcome":
            self.welcomed = True
        elif kind == "assignment":
            self.world.say(self.node_id, "hears generation %d", message.assignment.generation.number)
            self.world.invariants.assigned(self, message.assignment)
            if message.assignment.request_id == self.request_id:
                self.generation, self.answered = message.assignment.generation.number, True
        elif kind == "stop_workers":
            if self.answered and message.stop_workers.generation == self.generation:
                self.world.scheduler.after(self.world.rng.random() * 0.3, self._stopped, self.generation)
        elif kind == "dismissed":
            self.leave()

    def _stopped(self, generation: int) -> None:
        if self.answered and self.generation == generation:
            self.ask()
