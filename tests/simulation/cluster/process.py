"""One controller process: the real runner, store, streams and Jobs service, term after term, on the fake clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
from simulation.cluster.disk import DiskStore
from simulation.cluster.loop import ProcessLoop
from simulation.cluster.members import MEMBERS, Channel
from stretto_controller.reviewer import Reviewer
from stretto_controller.runner import Clocks, Runner, Unavailable
from stretto_controller.serve import take_part
from stretto_controller.service.errors import LEADER_KEY, abort
from stretto_controller.service.jobs import JobsService
from stretto_controller.service.streaming import Identity, NodePeer
from stretto_controller.service.streams import Conversation
from stretto_controller.sessions import Stopping
from stretto_controller.settings import EtcdSettings
from stretto_controller.store.contents import Leader, Save, Store, StoreError
from stretto_controller.store.etcd.connection import Connection
from stretto_controller.store.etcd.store import EtcdStore
from stretto_proto.v1 import types_pb2 as types

if TYPE_CHECKING:
    from simulation.cluster.world import World


class Aborted(Exception):
    """A call has ended with a status; gRPC raises something of the kind."""


class Call:
    """One RPC of one client to one life of a controller: what the services use of a `ServicerContext`.

    replied, ended: called on the client's side, some time later, with a message, or with (status, leader's address).
    """

    def __init__(
        self,
        process: Process,
        replied: Callable[[Any], None],
        ended: Callable[[grpc.StatusCode, str], None],
    ) -> None:
        self.process, self._replied, self._ended = process, replied, ended
        self.life = process.life
        # The client has closed it, or given it up.
        self.closed = False
        self.task: asyncio.Task[None] | None = None
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        # The client has heard of the end.
        self._over = False
        # A message was lost: nothing more passes.
        self._broken = False
        self._due_s = [0.0, 0.0]

    # -- the client's side

    def open(self, serve: Callable[[Call], Any]) -> None:
        """Have `serve` run in the process, once the request is there."""
        self._deliver(0, self._begin, serve)

    def send(self, message: Any) -> None:
        self._deliver(0, self._in_process, lambda: self._requests.put_nowait(message))

    def close(self) -> None:
        """The client ends the stream, or waits no longer."""
        if not self.closed:
            self.closed = True
            self._deliver(0, self._in_process, self._cancel)

    def _begin(self, serve: Callable[[Call], Any]) -> None:
        process = self.process
        if process.life != self.life or not process.up:
            self.end(grpc.StatusCode.UNAVAILABLE)
            return

        def begin() -> None:
            if not self.closed:
                self.task = asyncio.get_running_loop().create_task(serve(self))
                process.calls.append(self)

        process.loop.run(begin)

    def _in_process(self, call: Callable[[], None]) -> None:
        if self.process.life == self.life and self.process.up:
            self.process.loop.run(call)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    # -- the process's side

    async def write(self, message: Any) -> None:
        if self.alive:
            self.process.world.invariants.spoke(self.process)
        self.reply(message)

    def reply(self, message: Any) -> None:
        if self.alive:
            self.process.world.faults.moment("told", self.process.number)
            self._deliver(1, self._hear, message)

    async def abort(self, code: grpc.StatusCode, message: str, metadata: Any = ()) -> None:
        self.process.world.say(f"c{self.process.number}", "answers %s: %s", code.name, message)
        leader = next((types.Leader.FromString(value) for key, value in metadata if key == LEADER_KEY), types.Leader())
        if self.alive:
            self.end(code, leader.grpc_address)
        raise Aborted(message)

    @property
    def alive(self) -> bool:
        return self.process.life == self.life and self.process.up

    async def requests(self) -> AsyncIterator[Any]:
        while True:
            yield await self._requests.get()

    def end(self, code: grpc.StatusCode, leader: str = "") -> None:
        """Tell the client that the call is over."""
        self._deliver(1, self._hear_end, code, leader)

    def _hear(self, message: Any) -> None:
        if not self._over and not self.closed:
            self._replied(message)

    def _hear_end(self, code: grpc.StatusCode, leader: str) -> None:
        if not self._over and not self.closed:
            self._over = True
            self._ended(code, leader)

    def _deliver(self, direction: int, call: Callable[..., None], *args: Any) -> None:
        """In order, over one connection; nothing comes where the process cannot be reached."""
        world = self.process.world
        self._due_s[direction] = max(self._due_s[direction], world.scheduler.now_s + world.delay_s())
        world.scheduler.after(self._due_s[direction] - world.scheduler.now_s, self._passed, call, args)

    def _passed(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._broken:
            return
        if not self.process.cut_off:
            call(*args)
            return
        # Both sides notice in time that nothing passes; until then they wait.
        self._broken = True
        world = self.process.world
        world.scheduler.after(world.rng.uniform(0.5, 4.0), self._hear_end, grpc.StatusCode.UNAVAILABLE, "")
        world.scheduler.after(world.rng.uniform(0.5, 4.0), self._in_process, self._cancel)


class Process:
    """A controller's process, started again and again under the same address."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.address = f"c{number}:1"
        self.up = False
        self.frozen = 0
        # How many faults keep its clients away.
        self.cut_off = 0
        # Counts starts and ends: what was under way in an earlier life is void.
        self.life = 0
        self.steady_since_s = 0.0
        self.runner: Runner | None = None
        self.store: Store | None = None
        self.calls: list[Call] = []
        self.loop = self._new_loop()

    @property
    def ready(self) -> bool:
        return self.up and not self.frozen and self.runner is not None and self.runner.ready

    @property
    def can_lead(self) -> bool:
        """It runs, and every member of etcd is within its reach."""
        cut = self.world.members.cut
        return self.up and not self.frozen and not any(cut[self.number, member] for member in range(MEMBERS))

    # -- its life

    def start(self) -> None:
        if self.up:
            return
        self.world.say(f"c{self.number}", "starts")
        self.up, self.life = True, self.life + 1
        self.steady_since_s = self.world.scheduler.now_s
        self.loop = self._new_loop()
        self.loop.run(lambda: self.loop.create_task(self._live()))

    def kill(self) -> None:
        """kill -9, between any two calls of its loop."""
        if not self.up:
            return
        self.world.say(f"c{self.number}", "is killed")
        self.loop.dead = True
        calls, self.calls = self.calls, []
        self.up, self.frozen, self.runner, self.store = False, 0, None, None
        self.life += 1
        for call in calls:
            call.end(grpc.StatusCode.UNAVAILABLE)
        # Not before the call that is under way, if it is this process's own, has come to its end.
        self.world.scheduler.after(0.0, self.world.scheduler.after, 0.0, self.loop.bury)

    def freeze(self) -> None:
        self.world.say(f"c{self.number}", "is frozen")
        self.frozen += 1
        self.loop.freeze()

    def thaw(self) -> None:
        if self.frozen:
            self.frozen -= 1
            if not self.frozen:
                self.world.say(f"c{self.number}", "goes on")
                self.steady_since_s = self.world.scheduler.now_s
                self.loop.thaw()

    def _new_loop(self) -> ProcessLoop:
        return ProcessLoop(self.world.scheduler, work_s=self.world.work_s, broken=self.world.invariants.crashed)

    async def _live(self) -> None:
        """`serve`: a term after the other; with sqlite there is one."""
        try:
            await self._term(again=False)
            while self.world.setup.etcd:
                await self._term(again=True)
        except StoreError as error:
            self.world.say(f"c{self.number}", "ends: %s", error)
            self._exit()

    def _exit(self) -> None:
        """It ends by itself; somebody starts it again."""
        self.kill()
        self.world.scheduler.after(1.0, self.start)

    async def _term(self, *, again: bool) -> None:
        world, setup = self.world, self.world.setup
        store = self._open_store()
        clocks = Clocks(lambda: world.scheduler.now_s, lambda: 1e9 + world.scheduler.now_s)
        runner = Runner(store, setup.service, setup.limits, clocks=clocks)
        self.runner, self.store = runner, store
        reviewer = Reviewer(runner, setup.service, setup.limits)
        me = Leader(self.address, f"http://{self.address}")
        taking = asyncio.get_running_loop().create_task(take_part(store, runner, reviewer, lambda: me, again=again))
        failed = asyncio.get_running_loop().create_task(runner.failed.wait())
        try:
            await asyncio.wait([taking, failed], return_when=asyncio.FIRST_COMPLETED)
            if runner.failure is None:
                taking.result()
        finally:
            for task in (taking, failed):
                task.cancel()
            await asyncio.wait([taking, failed])
            await runner.stop()
            runner.sessions.end_all(Stopping("this controller is stopping; connect again"))
            await self._end_calls()
            await store.close()
        world.say(f"c{self.number}", "ends its term: %s", runner.failure)

    async def _end_calls(self) -> None:
        """A server that stops: calls have a moment to end, then they are cut."""
        calls, self.calls = self.calls, []
        tasks = [call.task for call in calls if call.task is not None and not call.task.done()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=0.2)
            for task in late:
                task.cancel()
        for call in calls:
            call.end(grpc.StatusCode.UNAVAILABLE)

    def _open_store(self) -> Store:
        world, setup, life = self.world, self.world.setup, self.life

        def alive() -> bool:
            return self.up and self.life == life

        if not setup.etcd:
            return DiskStore(world, world.disk, alive)
        settings = EtcdSettings(endpoints=",".join(f"m:{member}" for member in range(MEMBERS)))

        def channel(endpoint: str, _: Any) -> Any:
            return Channel(world, self.number, alive, int(endpoint.partition(":")[2]))

        connection = Connection(settings, channel)
        # Some ask one member first, some another.
        connection._position = (self.number + setup.rotation) % MEMBERS
        store = EtcdStore(
            settings,
            kept_events=setup.service.kept_events,
            kept_generations=setup.service.kept_generations,
            connection=connection,
            now_s=lambda: world.scheduler.now_s,
        )
        keep = store.save

        def noted(save: Save) -> asyncio.Future[None]:
            saved = keep(save)
            if alive():
                world.faults.moment("decided", self.number)
            return saved

        store.save = noted  # type: ignore[method-assign]  # a moment at which faults lie in wait
        return store

    # -- what it serves

    async def attend(self, call: Call) -> None:
        """Rendezvous.Attend."""
        runner = self._serving()
        with contextlib.suppress(Aborted):
            await self._gate(runner, call)
            conversation = Conversation(runner, self.world.setup.service, NodePeer(_IDENTITY))
            await conversation.serve(call.requests(), call)  # type: ignore[arg-type]  # what it uses of a context
            call.end(grpc.StatusCode.OK)

    def ask(self, method: str, request: Any) -> Callable[[Call], Any]:
        """Jobs.METHOD."""

        async def serve(call: Call) -> None:
            runner = self._serving()
            with contextlib.suppress(Aborted):
                await self._gate(runner, call)
                answer = await getattr(JobsService(runner, _IDENTITY), method)(request, call)
                call.reply(answer)

        return serve

    def _serving(self) -> Runner:
        assert self.runner is not None
        return self.runner

    async def _gate(self, runner: Runner, call: Call) -> None:
        """As `LeaderGate`."""
        try:
            runner.refuse_unless_leading()
        except Unavailable as error:
            await abort(call, error)  # type: ignore[arg-type]  # as above


_IDENTITY = Identity("controller", 1.0)
