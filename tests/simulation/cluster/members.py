"""etcd's members and the network to them, as gRPC channels on the fake clock: what delays, loses and refuses.

Requests may be carried out though the answer is lost, may be carried out late, long after their sender has given up, or
never. The store's own `Connection` is on top of it, as it is on top of gRPC.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc.aio import AioRpcError, Metadata
from simulation.cluster.keyspace import Keyspace, Refused, Write
from stretto_controller.store.etcd import connection as client
from stretto_proto.v1 import etcd_pb2 as etcd

if TYPE_CHECKING:
    from simulation.cluster.world import World

MEMBERS = 3
# etcd looks for leases that have run out twice a second.
_EXPIRY_INTERVAL_S = 0.5


class Members:
    """Three members of one etcd; a majority serves, once it has a leader."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.keyspace = Keyspace(self._written)
        self.down: set[int] = set()
        # How many faults each is frozen by.
        self.frozen: Counter[int] = Counter()
        # (controller, member): nothing passes there.
        self.cut: Counter[tuple[int, int]] = Counter()
        self.leader = 0
        # When an election among the members, or an outage of most of them, ends; None while they serve.
        self._electing = False
        self.steady_since_s = 0.0
        self.watches: list[Watch] = []
        world.scheduler.after(_EXPIRY_INTERVAL_S, self._look_at_leases)

    @property
    def serving(self) -> bool:
        return not self._electing and self._majority()

    def answers(self, member: int) -> bool:
        return member not in self.down and not self.frozen[member]

    def carry_out(self, method: client.Method, request: Any) -> Any:
        """The request's effect and its answer, at this moment. Raises Refused."""
        now_s = self.world.scheduler.now_s
        match method.path:
            case client.RANGE.path:
                return self.keyspace.range(request)
            case client.TXN.path:
                return self.keyspace.transact(request)
            case client.LEASE_GRANT.path:
                return self.keyspace.grant(request.ttl, now_s)
            case client.LEASE_REVOKE.path:
                return self.keyspace.revoke(request.id)
            case client.LEASE_KEEP_ALIVE.path:
                return self.keyspace.keep_alive(request.id, now_s)
        raise AssertionError(method.path)

    # -- what goes wrong

    def kill(self, member: int) -> None:
        self.down.add(member)
        self._disturbed()
        for watch in [watch for watch in self.watches if watch.member == member]:
            watch.break_("Socket closed")
        self._elect_if_leaderless()

    def start(self, member: int) -> None:
        self.down.discard(member)
        self._disturbed()
        self._elect_if_leaderless()

    def freeze(self, member: int) -> None:
        self.frozen[member] += 1
        self._disturbed()
        self._elect_if_leaderless()

    def thaw(self, member: int) -> None:
        self.frozen[member] = max(0, self.frozen[member] - 1)
        self._disturbed()
        self._elect_if_leaderless()
        for watch in self.watches:
            watch.go_on()

    def heal(self) -> None:
        self.down.clear()
        self.frozen.clear()
        self.cut.clear()
        self._disturbed()
        self._elect_if_leaderless()
        for watch in self.watches:
            watch.go_on()

    def _disturbed(self) -> None:
        self.steady_since_s = self.world.scheduler.now_s

    def _majority(self) -> bool:
        return sum(self.answers(member) for member in range(MEMBERS)) * 2 > MEMBERS

    def _elect_if_leaderless(self) -> None:
        if self.answers(self.leader) or self._electing:
            return
        self._electing = True
        self.world.scheduler.after(self.world.rng.uniform(1.0, 1.6), self._elected)

    def _elected(self) -> None:
        if not self._majority():
            self.world.scheduler.after(0.2, self._elected)
            return
        self._electing = False
        self.leader = self.world.rng.choice([member for member in range(MEMBERS) if self.answers(member)])
        self.keyspace.promote(self.world.scheduler.now_s)
        self._disturbed()
        self.world.say("etcd", "member %d leads", self.leader)

    def _look_at_leases(self) -> None:
        if self.serving:
            self.keyspace.expire(self.world.scheduler.now_s)
        self.world.scheduler.after(_EXPIRY_INTERVAL_S, self._look_at_leases)

    def _written(self, write: Write) -> None:
        self.world.invariants.etcd_written(write)
        for watch in self.watches:
            watch.go_on()


class Channel:
    """From one life of a controller to one member: what `Connection` uses of a `grpc.aio.Channel`."""

    def __init__(self, world: World, controller: int, alive: Callable[[], bool], member: int) -> None:
        self.world, self.controller, self.alive, self.member = world, controller, alive, member

    def unary_unary(self, path: str, **_: Any) -> Callable[..., Awaitable[Any]]:
        def call(request: Any, metadata: Any) -> Awaitable[Any]:
            return self.send(path, request)

        return call

    def stream_stream(self, path: str, **_: Any) -> Callable[..., Watch | OneAnswer]:
        def call(metadata: Any) -> Watch | OneAnswer:
            return Watch(self) if path == client.WATCH.path else OneAnswer(self, path)

        return call

    async def close(self) -> None:
        pass

    @property
    def passes(self) -> bool:
        return not self.world.members.cut[self.controller, self.member]

    def send(self, path: str, request: Any) -> asyncio.Future[Any]:
        """The future of the answer; it may never be done."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        world, rng = self.world, self.world.rng
        if not self.alive():
            return answer
        delay_s = world.delay_s()
        if world.setup.lossy and rng.random() < world.setup.lossy:
            # Carried out, if at all, when nobody waits for it any more.
            delay_s += rng.uniform(0.0, 4.0)
            world.scheduler.after(rng.uniform(0.0, delay_s), self._answer, answer, _lost())
        copy = type(request)()
        copy.CopyFrom(request)
        world.scheduler.after(delay_s, self._arrive, path, copy, answer)
        return answer

    def _arrive(self, path: str, request: Any, answer: asyncio.Future[Any]) -> None:
        world, members = self.world, self.world.members
        if not self.passes or members.frozen[self.member]:
            return
        if self.member in members.down:
            self._later(answer, _error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"))
            return
        if not members.serving:
            if world.rng.random() < 0.5:
                self._later(answer, _error(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader"))
            elif world.rng.random() < 0.5:
                # It waits for a leader, and is carried out then.
                world.scheduler.after(world.rng.uniform(0.5, 2.0), self._arrive, path, request, answer)
            return
        method = client.Method(path, etcd.EtcdTxnResponse)
        try:
            done = members.carry_out(method, request)
        except Refused as refused:
            done = _error(refused.code, refused.details)
        if path == client.TXN.path:
            world.faults.moment("applied", self.controller)
        if world.setup.lossy and world.rng.random() < world.setup.lossy:
            done = _lost() if world.rng.random() < 0.5 else None
        self._later(answer, done)

    def _later(self, answer: asyncio.Future[Any], done: Any) -> None:
        if done is not None and self.passes:
            self.world.scheduler.after(self.world.delay_s(), self._answer, answer, done)

    def _answer(self, answer: asyncio.Future[Any], done: Any) -> None:
        if answer.done() or not self.passes or not self.alive():
            return
        if isinstance(done, Exception):
            answer.set_exception(done)
        else:
            answer.set_result(done)


class OneAnswer:
    """A stream on which one request is answered, as the store renews leases."""

    def __init__(self, channel: Channel, path: str) -> None:
        self._channel, self._path = channel, path
        self._answer: asyncio.Future[Any] | None = None

    async def write(self, request: Any) -> None:
        self._answer = self._channel.send(self._path, request)

    async def read(self) -> Any:
        assert self._answer is not None
        return await self._answer

    def cancel(self) -> None:
        pass


class Watch:
    """One watch stream. Events come in order, late, or, through a break, not at all."""

    def __init__(self, channel: Channel) -> None:
        self.member = channel.member
        self._channel = channel
        self._key = b""
        self._next = 0
        self._over = False
        self._responses: list[etcd.EtcdWatchResponse | Exception] = []
        self._news: asyncio.Future[None] | None = None
        self._due_s = 0.0

    async def write(self, request: etcd.EtcdWatchRequest) -> None:
        create = request.create_request
        self._key, self._next = create.key, create.start_revision
        self._channel.world.scheduler.after(self._channel.world.delay_s(), self._begin)

    def _begin(self) -> None:
        world, members = self._channel.world, self._channel.world.members
        if self._over or not self._channel.passes or members.frozen[self.member]:
            return
        if self.member in members.down:
            self._tell(_error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"))
        elif members.keyspace.compacted > self._next:
            compacted = members.keyspace.compacted
            self._tell(etcd.EtcdWatchResponse(created=True))
            self._tell(etcd.EtcdWatchResponse(canceled=True, compact_revision=compacted, cancel_reason="compacted"))
        else:
            self._tell(etcd.EtcdWatchResponse(created=True))
            world.members.watches.append(self)
            self.go_on()

    def go_on(self) -> None:
        """Send what is new, if the member can."""
        members = self._channel.world.members
        if self._over or not members.answers(self.member):
            return
        for revision, event in members.keyspace.events(self._key, self._next):
            self._next = revision + 1
            # header.revision may be ahead of the events that were sent: a trap.
            header = etcd.EtcdHeader(revision=members.keyspace.revision)
            self._tell(etcd.EtcdWatchResponse(header=header, events=[event]))

    def break_(self, reason: str) -> None:
        self._tell(_error(grpc.StatusCode.UNAVAILABLE, reason))
        self.cancel()

    def _tell(self, response: etcd.EtcdWatchResponse | Exception) -> None:
        world = self._channel.world
        # In order, over one connection.
        self._due_s = max(self._due_s, world.scheduler.now_s + world.delay_s())
        world.scheduler.after(self._due_s - world.scheduler.now_s, self._come, response)

    def _come(self, response: etcd.EtcdWatchResponse | Exception) -> None:
        if not self._channel.passes or not self._channel.alive():
            return
        self._responses.append(response)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def read(self) -> Any:
        while not self._responses:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        response = self._responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return response

    def cancel(self) -> None:
        self._over = True
        if self in self._channel.world.members.watches:
            self._channel.world.members.watches.remove(self)


def _error(code: grpc.StatusCode, details: str) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details)


def _lost() -> AioRpcError:
    return _error(grpc.StatusCode.UNAVAILABLE, "Socket closed")
