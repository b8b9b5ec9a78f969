"""Agents and live workers as the controller meets them: they join, beat once a second, obey, and come back."""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from stretto.errors import FATAL_CODES
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

from load.wire import Connection, framed, opening

BEAT_S = 1.0
# Beats are spread over so many moments of a second.
_SLOTS = 200
# The library's own: full jitter, the n-th pause within 0..min(longest, first * 2^n).
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_ANSWER_TIMEOUT_S, _ANSWER_LIMIT_S = 5.0, 20.0
# Of all beats, those that are a question which the controller answers on the stream.
QUESTIONS = 0.01
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_FATAL = frozenset(code.value[0] for code in FATAL_CODES)


@dataclass
class Counts:
    """What happened to the whole fleet."""

    sent: int = 0
    # Seconds from each question to its answer, and from each hello to its welcome.
    answers_s: list[float] = field(default_factory=list)
    welcomes_s: list[float] = field(default_factory=list)
    # Streams that have been welcomed and are open.
    open: int = 0
    seated: int = 0
    # What a user would see, or what a healthy node must not hear.
    fatal: list[str] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    retried: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        what = f"{self.open} streams are open, {self.seated} workers in a generation; retried: {self.retried}"
        return "; ".join([what, *self.fatal[:2], *self.evicted[:2]])


class Stream(ABC):
    """One stream that comes back by itself, with the library's pauses."""

    method = ""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.fleet = fleet
        self.counts = fleet.counts
        self.welcomed = False
        self.gone = False
        self._connection: Connection | None = None
        self._attempts = self._unanswered = 0
        self._opened_s = 0.0
        self._slot = fleet.take_slot()

    @abstractmethod
    def hello(self) -> bytes: ...

    @abstractmethod
    def beat(self) -> bytes: ...

    @abstractmethod
    def receive(self, data: bytes) -> None: ...

    def start(self) -> None:
        self.fleet.spawn(self._connect())

    def say(self, message: bytes) -> None:
        if self._connection is not None:
            self.counts.sent += 1
            self._connection.write(framed(message))

    def die(self) -> None:
        """As a killed process: its connection closes, and nobody comes back."""
        self.gone = True
        self._close()
        if self._connection is not None:
            self._connection.abort()

    async def _connect(self) -> None:
        self._opened_s = time.monotonic()
        first = opening(self.method, self.fleet.authority) + framed(self.hello())
        self.counts.sent += 1
        connection = self._connection = Connection(first, self._take, self._end)
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(lambda: connection, *self.fleet.address)
        except (OSError, TimeoutError) as error:
            connection.abort()
            self._end(-1, type(error).__name__)
            return
        await asyncio.sleep(min(_ANSWER_LIMIT_S, _ANSWER_TIMEOUT_S * 2.0 ** min(self._unanswered, 30)))
        if self._connection is connection and not self.welcomed and not self.gone:
            self._unanswered += 1
            connection.abort()
            self._end(-1, "no answer in time")

    def _take(self, data: bytes) -> None:
        if not self.welcomed and not self.gone:
            self.welcomed = True
            self.counts.open += 1
            self.counts.welcomes_s.append(time.monotonic() - self._opened_s)
            self._attempts = self._unanswered = 0
            self.fleet.slots[self._slot].add(self)
        if not self.gone:
            self.receive(data)

    def _close(self) -> None:
        if self.welcomed:
            self.welcomed = False
            self.counts.open -= 1
        self.fleet.slots[self._slot].discard(self)

    def _end(self, status: int, message: str) -> None:
        """The stream has ended; again, after a pause."""
        if self.gone:
            return
        self._close()
        if status in _FATAL:
            self.counts.fatal.append(f"{self.name}: {_CODES[status].name} {message}")
            return
        reason = _CODES[status].name if status in _CODES else message
        self.counts.retried[reason] = self.counts.retried.get(reason, 0) + 1
        bound_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._attempts, 30))
        self._attempts += 1
        self.fleet.spawn(self._again(self.fleet.rng.uniform(0.0, bound_s)))

    async def _again(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        if not self.gone:
            await self._connect()


class Agent(Stream):
    """A node's agent, with its workers."""

    method = "/stretto.v1.Rendezvous/Attend"

    def __init__(self, fleet: Fleet, job: str, name: str, slots: int, spec: types.JobSpec) -> None:
        super().__init__(fleet, name)
        self.job, self.spec = job, spec
        self.workers = [Worker(fleet, self, rank) for rank in range(slots)]
        self._started = False
        self._beat = rendezvous.AttendRequest(heartbeat=rendezvous.NodeHeartbeat()).SerializeToString()

    def hello(self) -> bytes:
        hello = rendezvous.NodeHello(
            protocol_version=1,
            job=self.job,
            node_id=self.name,
            node_key=f"the secret key of {self.name}",
            slots=len(self.workers),
            address="127.0.0.1",
            spec=self.spec,
        )
        if not self._started:
            hello.ready.request_id = 1
        return rendezvous.AttendRequest(hello=hello).SerializeToString()

    def beat(self) -> bytes:
        return self._beat

    def receive(self, data: bytes) -> None:
        message = rendezvous.AttendResponse.FromString(data)
        kind = message.WhichOneof("body")
        if kind == "start_workers" and not self._started:
            self._started = True
            for worker in self.workers:
                worker.start()
        elif kind in ("stop_workers", "dismissed"):
            self.counts.evicted.append(f"{self.job}/{self.name}: {kind}, {getattr(message, kind).reason}")

    def kill(self) -> None:
        """The node loses power."""
        for stream in (self, *self.workers):
            stream.die()


class Worker(Stream):
    """A live worker: asks for its place, trains, leaves or is cut, and asks again with what it has."""

    method = "/stretto.v1.Training/Train"

    def __init__(self, fleet: Fleet, agent: Agent, local_rank: int) -> None:
        super().__init__(fleet, f"{agent.name}/{local_rank}")
        self._agent, self._local_rank = agent, local_rank
        self.rank, self.generation, self.step = -1, 0, 0
        self._request = training.WorkerReady(request_id=1, store_port=20000, preflight_port=30000)
        self._asked_s = 0.0
        self.cut_at_s = 0.0

    @property
    def job(self) -> str:
        return self._agent.job

    def hello(self) -> bytes:
        spec = types.JobSpec(base_batch_size=8, batch_size=8)
        hello = training.WorkerHello(
            protocol_version=1,
            job=self.job,
            node_id=self._agent.name,
            rank=self.rank,
            local_rank=self._local_rank,
            generation=self.generation,
            spec=spec,
            ready=None if self.generation else self._request,
        )
        return training.TrainRequest(hello=hello).SerializeToString()

    def beat(self) -> bytes:
        """Alive; of rank 0 its progress; and now and then a question, whose answer is waited for."""
        if self.generation:
            self.step += 10
            if self.fleet.questions and not self._asked_s and self.fleet.rng.random() < QUESTIONS:
                self._asked_s = time.monotonic()
                return training.TrainRequest(ready=self._request).SerializeToString()
            if self.rank == 0:
                progress = types.Progress(
                    generation=self.generation,
                    step=self.step,
                    tau=self.step * 1.5,
                    gain=1.5,
                    loss=0.5,
                    effective_lr=[0.1],
                    base_lr=[0.1],
                    samples=self.step * 8,
                    generation_steps=self.step,
                )
                return training.TrainRequest(progress=progress).SerializeToString()
        alive = training.WorkerAlive(generation=self.generation, step=self.step, median_step_s=0.1)
        return training.TrainRequest(alive=alive).SerializeToString()

    def receive(self, data: bytes) -> None:
        message = training.TrainResponse.FromString(data)
        kind = message.WhichOneof("body")
        if kind == "assignment":
            if self._asked_s:
                self.counts.answers_s.append(time.monotonic() - self._asked_s)
                self._asked_s = 0.0
            if not self.generation:
                self.counts.seated += 1
            self.rank, self.generation = message.assignment.rank, message.assignment.generation
        elif kind == "leave":
            self.ask(failed=False)
        elif kind == "cut":
            self.cut_at_s = time.time()
            self.ask(failed=True)
        elif kind in ("fenced", "save_and_exit"):
            self.counts.evicted.append(f"{self.job}/{self.name}: {kind}, {getattr(message, kind).reason}")

    def ask(self, *, failed: bool, unreachable: tuple[int, ...] = ()) -> None:
        """Out of the generation, with its state: a place in the next, please."""
        if not self.generation:
            return
        self.counts.seated -= 1
        self._request.request_id += 1
        self._request.generation = self._request.version_generation = self.generation
        self._request.version_step = self.step
        self._request.failed = failed
        self._request.unreachable[:] = unreachable
        self.rank, self.generation, self._asked_s = -1, 0, 0.0
        self.say(training.TrainRequest(ready=self._request).SerializeToString())

    def _close(self) -> None:
        super()._close()
        self._asked_s = 0.0
        if self.gone and self.generation:
            self.counts.seated -= 1
            self.generation = 0


class Fleet:
    """Nodes of several jobs, spread evenly, each beating once a second."""

    def __init__(self, endpoint: str, *, nodes: int, slots: int, jobs: int, seed: int) -> None:
        host, _, port = endpoint.rpartition(":")
        self.authority, self.address = endpoint, (host, int(port))
        self.rng = random.Random(seed)
        self.counts = Counts()
        self.questions = False
        self.slots: list[set[Stream]] = [set() for _ in range(_SLOTS)]
        self._next_slot = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.jobs: dict[str, list[Agent]] = {}
        for job in range(jobs):
            count = len(range(job, nodes, jobs))
            spec = types.JobSpec(min_nodes=1, max_nodes=count, mode=types.RECONFIGURE_MODE_IN_PROCESS)
            name = f"job-{job}"
            self.jobs[name] = [Agent(self, name, f"n{job}-{index}", slots, spec) for index in range(count)]
        self.workers = nodes * slots
        self.streams = nodes + self.workers

    @property
    def agents(self) -> Iterator[Agent]:
        return (agent for agents in self.jobs.values() for agent in agents)

    def take_slot(self) -> int:
        # A step that has no divisor in common with the number of slots: neighbours beat at different times.
        self._next_slot = (self._next_slot + 73) % _SLOTS
        return self._next_slot

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def beat(self) -> None:
        """Every stream that is welcomed beats once a second, until cancelled."""
        at_s = time.monotonic()
        while True:
            for slot in self.slots:
                for stream in tuple(slot):
                    stream.say(stream.beat())
                at_s += BEAT_S / _SLOTS
                pause_s = at_s - time.monotonic()
                # A generator that was held up does not make up for it with a burst.
                at_s = max(at_s, time.monotonic() - BEAT_S)
                await asyncio.sleep(max(0.0, pause_s))

    def close(self) -> None:
        for agent in self.agents:
            agent.kill()
        for task in self._tasks:
            task.cancel()
