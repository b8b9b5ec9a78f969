"""One bidirectional stream from its Hello to its end, the same for agents and workers."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc

from stretto_controller.core.errors import Rejected
from stretto_controller.core.events import Event, StreamClosed, WorkerStreamClosed
from stretto_controller.runner import Runner
from stretto_controller.service.errors import ANSWERED, abort
from stretto_controller.service.guard import Malformed
from stretto_controller.sessions import Outbox, StreamAction
from stretto_controller.settings import ServiceLimits

Context = grpc.aio.ServicerContext[Any, Any]


class Peer(ABC):
    """Who speaks on one stream: reads its messages as events, writes actions as its messages."""

    def __init__(self) -> None:
        self.session_id = uuid4().hex
        # Known from the Hello on.
        self.job = ""

    @abstractmethod
    def hello(self, message: Any) -> Event:
        """The event of the first message; sets `job`. Raises Rejected."""

    @abstractmethod
    def event(self, message: Any) -> Event:
        """The event of a later message. Raises Rejected."""

    @abstractmethod
    def closed(self) -> StreamClosed | WorkerStreamClosed: ...

    @abstractmethod
    def greeting(self) -> Any | None:
        """What to write once the Hello is accepted, before any action; None: an action will do."""

    @abstractmethod
    def message(self, action: StreamAction) -> Any: ...


@dataclass(slots=True)
class MessageRate:
    """A token bucket over one stream's messages."""

    limits: ServiceLimits
    tokens: float = 0.0
    filled_s: float = 0.0

    def take(self, now_s: float) -> None:
        """Count one message. Raises Rejected when there are too many."""
        burst, per_s = self.limits.stream_messages_burst, self.limits.stream_messages_per_s
        self.tokens = min(burst, self.tokens + (now_s - self.filled_s) * per_s)
        self.filled_s = now_s
        if self.tokens < 1:
            raise Rejected.exhausted(
                f"more than {per_s:g} messages a second came on this stream (at most {burst} at once); send fewer"
            )
        self.tokens -= 1


class Conversation:
    """Serves one stream. Whatever ends it, the core hears of it once, at once."""

    def __init__(self, runner: Runner, limits: ServiceLimits, peer: Peer) -> None:
        self._runner = runner
        self._limits = limits
        self._peer = peer
        self._outbox = Outbox(limits.outbox_length)
        self._writer: asyncio.Task[None] | None = None
        self._mid_write = self._ending = False
        self._rate = MessageRate(limits, limits.stream_messages_burst, time.monotonic())

    async def serve(self, requests: AsyncIterator[Any], context: Context) -> None:
        try:
            await self._serve(requests, context)
        except ANSWERED as error:
            await self._written()
            await abort(context, error)
        await self._written()

    async def _serve(self, requests: AsyncIterator[Any], context: Context) -> None:
        peer, sessions = self._peer, self._runner.sessions
        if len(sessions) >= self._limits.max_sessions:
            raise Rejected.exhausted(
                f"this controller has {len(sessions)} open streams, its limit; try again later or raise max_sessions"
            )
        sessions.open(peer.session_id, self._outbox)
        accepted = False
        try:
            hello = peer.hello(await self._first(requests))
            self._runner.submit(peer.job, hello)
            accepted = True
            await self._runner.settled(peer.job)
            greeting = peer.greeting()
            self._runner.refuse_unless_leading()
            if greeting is not None:
                await context.write(greeting)
            await self._exchange(requests, context)
        except Rejected:
            # The refusal may rest on a decision that is not saved yet.
            await self._runner.settled(peer.job)
            raise
        finally:
            sessions.close(peer.session_id)
            if accepted:
                self._runner.close_stream(peer.job, peer.closed())

    async def _first(self, requests: AsyncIterator[Any]) -> Any:
        limit_s = self._limits.first_message_s
        try:
            async with asyncio.timeout(limit_s):
                return _readable(await anext(requests))
        except TimeoutError as error:
            # It may wait unread: a controller under many streams is itself late.
            raise Rejected.not_yet(f"no hello came within {limit_s:g} s; connect again") from error
        except StopAsyncIteration as error:
            raise Rejected.invalid("the stream ended before its hello") from error

    async def _exchange(self, requests: AsyncIterator[Any], context: Context) -> None:
        """Read and write at the same time, until either ends."""
        reader = asyncio.create_task(self._read(requests))
        writer = self._writer = asyncio.create_task(self._write(context))
        tasks = (reader, writer)
        for task in tasks:
            task.add_done_callback(_looked_at)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            self._ending = True
            # A call whose write is cancelled half-way never gets a status, and its peer waits for ever.
            if not self._mid_write:
                writer.cancel()
        for task in tasks:
            if task in done:
                task.result()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        """Feed the core. What must be saved is waited for, so that a slow disk slows the peers down."""
        async for message in requests:
            self._rate.take(time.monotonic())
            self._runner.submit(self._peer.job, self._peer.event(_readable(message)))
            await self._runner.settled(self._peer.job)

    async def _write(self, context: Context) -> None:
        async for action in self._outbox.actions():
            # It may have waited while this process was stopped, and another leads by now.
            self._runner.refuse_unless_leading()
            self._mid_write = True
            await context.write(self._peer.message(action))
            self._mid_write = False
            if self._ending:
                return

    async def _written(self) -> None:
        """Wait for a write under way, if the peer reads at all: the status comes after it."""
        if self._writer is not None and not self._writer.done():
            await asyncio.wait([self._writer], timeout=self._limits.last_write_s)
            self._writer.cancel()


def _looked_at(task: asyncio.Task[None]) -> None:
    """When both fail, the first failure counts; asyncio would complain about the other."""
    if not task.cancelled():
        task.exception()


def _readable(message: Any) -> Any:
    if isinstance(message, Malformed):
        raise Rejected.invalid(message.message)
    return message
