"""The open streams: where a decision's actions go."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from stretto_controller.core.actions import (
    Action,
    AskToLeave,
    AskToSave,
    Assign,
    AssignWorker,
    CloseSession,
    CutGeneration,
    Dismiss,
    FenceWorker,
    FinishGeneration,
    SaveAndExit,
    StartWorkers,
    StopWorkers,
    WelcomeWorker,
)

NodeAction = Assign | StartWorkers | StopWorkers | Dismiss | FinishGeneration
WorkerAction = WelcomeWorker | AskToLeave | AskToSave | AssignWorker | CutGeneration | SaveAndExit | FenceWorker
StreamAction = NodeAction | WorkerAction


class StreamEnd(Exception):
    """Why the controller ends a stream; the peer may open a new one."""


class Replaced(StreamEnd):
    """A newer stream of the same node or worker is open, or the controller has given this one up."""


class Overflow(StreamEnd):
    """The peer does not read what is sent to it."""


class Stopping(StreamEnd):
    """The controller stops."""


class Outbox:
    """Actions on their way to one stream, in order, at most `length` of them."""

    def __init__(self, length: int) -> None:
        self._actions: deque[StreamAction] = deque()
        self._length = length
        self._end: Exception | None = None
        self._news = asyncio.Event()

    def put(self, action: StreamAction) -> None:
        """Queue an action. A stream whose queue is full is ended: its peer comes back and is answered then."""
        if self._end is not None:
            return
        if len(self._actions) >= self._length:
            self.end(Overflow(f"{self._length} messages wait and none is read; open a new stream"))
            return
        self._actions.append(action)
        self._news.set()

    def end(self, reason: Exception) -> None:
        """End the stream after what is queued already. The first reason counts."""
        if self._end is None:
            self._end = reason
            self._news.set()

    async def actions(self) -> AsyncIterator[StreamAction]:
        """Each action once, as it comes; raises the reason given to `end`."""
        while True:
            while self._actions:
                yield self._actions.popleft()
            if self._end is not None:
                raise self._end
            self._news.clear()
            await self._news.wait()


@dataclass(frozen=True, slots=True)
class _NodeKey:
    job: str
    node_id: str


class Sessions:
    """Every open stream by session id, and each node's newest one."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}
        self._by_node: dict[_NodeKey, str] = {}

    def __len__(self) -> int:
        return len(self._outboxes)

    def open(self, session_id: str, outbox: Outbox) -> None:
        assert session_id not in self._outboxes, "a session id was used twice"
        self._outboxes[session_id] = outbox

    def bind(self, job: str, node_id: str, session_id: str) -> None:
        """From now on this node is spoken to on this stream: its Hello was accepted."""
        self._by_node[_NodeKey(job, node_id)] = session_id

    def close(self, session_id: str) -> None:
        self._outboxes.pop(session_id, None)

    def unbind(self, job: str, node_id: str, session_id: str) -> None:
        """Forget the node's stream, unless a newer one has taken its place."""
        key = _NodeKey(job, node_id)
        if self._by_node.get(key) == session_id:
            del self._by_node[key]

    def send(self, job: str, action: Action) -> None:
        """Put the action on its stream. A missing stream is no error: the peer comes back and is answered then."""
        if isinstance(action, NodeAction):
            session_id = self._by_node.get(_NodeKey(job, action.node_id), "")
        elif isinstance(action, WorkerAction | CloseSession):
            session_id = action.session_id
        else:
            return
        outbox = self._outboxes.get(session_id)
        if outbox is None:
            return
        if isinstance(action, CloseSession):
            outbox.end(
                Replaced("this stream is over: a newer one is open, or its node or worker is no longer counted on")
            )
        else:
            outbox.put(action)

    def end_all(self, reason: StreamEnd) -> None:
        for outbox in self._outboxes.values():
            outbox.end(reason)
