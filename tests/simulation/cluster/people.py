"""People who create, scale and delete jobs of their own, and remember what was acknowledged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from simulation.cluster.process import Call
from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import types_pb2 as types

if TYPE_CHECKING:
    from simulation.cluster.world import World

# Never reached: each request asks for another number of nodes.
_MAX_NODES = 4000
_PATIENCE_S = 3.0
# So often somebody looks at the job while a request is under way.
_GLANCES = 0.4
# How a job may stand: it is not there, or wants so many nodes.
Standing = int | None
_SURE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS)


class Person:
    """One request at a time about one job. `possible`: the ways in which it may stand, in the order of the requests.

    An answer makes a request certain. One that never came, or an error that leaves its outcome open, makes it possible.
    What was seen stays so: the job never stands again as it did before.
    """

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.job = f"job{number}"
        self.possible: list[Standing] = [None]
        # It was looked at after everything had healed.
        self.seen_last = False
        self.answers = 0
        self._numbers = itertools.count(2)
        self._target = world.rng.randrange(len(world.processes))
        self._request = 0
        # The request that was seen to be done before it was answered.
        self._seen_done = 0
        world.scheduler.after(world.rng.random() * 2.0, self.next)

    def next(self) -> None:
        """The next request."""
        rng, world = self.world.rng, self.world
        if world.faults.over:
            self._look()
            return
        what = rng.random()
        if self.possible == [None] or what < 0.1:
            nodes = next(self._numbers)
            spec = types.JobSpec(min_nodes=1, max_nodes=_MAX_NODES, mode=types.RECONFIGURE_MODE_RESTART)
            request = jobs.CreateJobRequest(job=self.job, spec=spec, desired_nodes=nodes)
            self._ask("CreateJob", request, lambda _: nodes)
        elif what < 0.1 + self.world.setup.deletions:
            self._ask("DeleteJob", jobs.DeleteJobRequest(job=self.job), lambda _: None)
        elif what < 0.6:
            self._look()
        else:
            nodes = next(self._numbers)
            scale = jobs.ScaleJobRequest(job=self.job, nodes=nodes)
            self._ask("ScaleJob", scale, lambda standing: None if standing is None else nodes)

    def _look(self) -> None:
        self._ask("GetJob", jobs.GetJobRequest(job=self.job), None)

    def _ask(self, method: str, request: Any, effect: Callable[[Standing], Standing] | None) -> None:
        self._request += 1
        number, process = self._request, self.world.processes[self._target]

        def answered(message: Any) -> None:
            if number == self._request:
                self._request += 1
                self._answered(method, message, effect)

        def ended(code: grpc.StatusCode, leader: str) -> None:
            if number == self._request:
                self._request += 1
                self._refused(method, code, leader, effect)

        call = Call(process, answered, ended)
        call.open(process.ask(method, request))
        if effect is not None and self.world.rng.random() < _GLANCES:
            self.world.scheduler.after(self.world.rng.random(), self._glance, number, effect)
        self.world.scheduler.after(_PATIENCE_S, self._waits_no_longer, number, call, effect)

    def _waits_no_longer(self, number: int, call: Call, effect: Callable[[Standing], Standing] | None) -> None:
        if number == self._request:
            self._request += 1
            call.close()
            self._open(effect)
            self._target = (self._target + 1) % len(self.world.processes)
            self.next()

    def _glance(self, number: int, effect: Callable[[Standing], Standing]) -> None:
        """Look at the job while a request is under way: what is seen of it by then is done for good."""

        def saw(standing: Standing) -> None:
            if number != self._request:
                return
            if standing not in self.possible:
                self._open(effect)
                self._seen_done = number
            self._saw(standing)

        def ended(code: grpc.StatusCode, leader: str) -> None:
            if code is grpc.StatusCode.NOT_FOUND:
                saw(None)

        process = self.world.processes[self._target]
        call = Call(process, lambda message: saw(message.job.desired_nodes), ended)
        call.open(process.ask("GetJob", jobs.GetJobRequest(job=self.job)))

    def _answered(self, method: str, message: Any, effect: Callable[[Standing], Standing] | None) -> None:
        self.world.say(self.job, "%s is answered", method)
        self.answers += 1
        if effect is None:
            self._saw(message.job.desired_nodes)
        else:
            self.possible = list({effect(standing) for standing in self.possible if self._could(method, standing)})
            self.world.invariants.require(
                bool(self.possible), f"{self.job}: {method} was answered, and cannot have been"
            )
            if method != "DeleteJob":
                self.world.invariants.require(
                    [message.job.desired_nodes] == self.possible,
                    f"{self.job}: {method} was answered with {message.job.desired_nodes} nodes, not {self.possible}",
                )
        self._later()

    def _could(self, method: str, standing: Standing) -> bool:
        """Whether a job that stands so has this answered well."""
        return self._seen_done == self._request - 1 or method == "CreateJob" or standing is not None

    def _refused(
        self, method: str, code: grpc.StatusCode, leader: str, effect: Callable[[Standing], Standing] | None
    ) -> None:
        self.world.say(self.job, "%s is refused: %s", method, code.name)
        if code in _SURE:
            self.world.invariants.require(
                None in self.possible, f"{self.job}: {method} was refused with {code.name}; it may be {self.possible}"
            )
            if effect is None:
                # A creation, or a deletion, may still be on its way to the store.
                self._saw(None)
            else:
                self.possible = [None]
        else:
            assert code is grpc.StatusCode.UNAVAILABLE, code
            self._open(effect)
            processes = self.world.processes
            known = [process.number for process in processes if process.address == leader]
            self._target = known[0] if known else (self._target + 1) % len(processes)
        self._later()

    def _open(self, effect: Callable[[Standing], Standing] | None) -> None:
        if effect is not None:
            self.possible += sorted({effect(standing) for standing in self.possible} - {None}, key=str) or [None]

    def _saw(self, standing: Standing) -> None:
        self.world.invariants.require(
            standing in self.possible,
            f"{self.job} was seen at {standing}; acknowledged was {sorted(map(str, self.possible))}",
        )
        self.possible = self.possible[self.possible.index(standing) :]
        self.seen_last = self.world.faults.over

    def _later(self) -> None:
        if not self.seen_last:
            self.world.scheduler.after(self.world.rng.random() * self.world.setup.request_pause_s, self.next)
