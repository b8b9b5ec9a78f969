"""The worker streams of one job, by session and by node: an immutable mapping.

Each decision asks every node for its own workers, and for a few sums over them: those are kept with the node's crew
until one of its workers changes. Looking through all workers for each node would be quadratic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stretto_controller.core.model import WorkerSession


class Crew:
    """The workers of one node, in the order in which they came. Never changes, so what is derived is derived once."""

    def __init__(self, workers: tuple[WorkerSession, ...] = ()) -> None:
        self.workers = workers

    @cached_property
    def open(self) -> tuple[WorkerSession, ...]:
        """Those whose streams are open, by local rank."""
        return tuple(sorted((w for w in self.workers if w.closed_s is None), key=lambda w: w.local_rank))

    @cached_property
    def asking(self) -> tuple[WorkerSession, ...]:
        """Those of `open` that ask for a place."""
        return tuple(w for w in self.open if w.ready is not None)

    @cached_property
    def asking_ranks(self) -> tuple[int, ...]:
        return tuple(w.local_rank for w in self.asking)

    @cached_property
    def heard_s(self) -> float:
        """When the one with an open stream that has been silent the longest was heard; inf if there is none."""
        return min((w.heard_s for w in self.open), default=math.inf)

    @cached_property
    def ranks(self) -> frozenset[int]:
        """The local ranks that have, or had, a stream."""
        return frozenset(w.local_rank for w in self.workers)

    @cached_property
    def silent_since_s(self) -> float:
        """When the worker that has been silent the longest was heard, with an open stream or without."""
        return min(w.heard_s for w in self.workers)

    @cached_property
    def closed_s(self) -> float | None:
        """When the first stream that is closed was closed."""
        return min((w.closed_s for w in self.workers if w.closed_s is not None), default=None)

    def with_(self, worker: WorkerSession) -> Crew:
        """This one, with the worker in place of an earlier session of that id."""
        if any(w.session_id == worker.session_id for w in self.workers):
            return Crew(tuple(worker if w.session_id == worker.session_id else w for w in self.workers))
        return Crew((*self.workers, worker))


_NOBODY = Crew()


class Roster(Mapping[str, "WorkerSession"]):
    """Worker sessions by session id; `crew` gives those of one node. Changes make a new one."""

    __slots__ = ("_by_session", "_crews")

    def __init__(self, workers: Iterable[WorkerSession] = ()) -> None:
        self._by_session = {worker.session_id: worker for worker in workers}
        by_node: dict[str, list[WorkerSession]] = {}
        for worker in self._by_session.values():
            by_node.setdefault(worker.node_id, []).append(worker)
        self._crews = {node_id: Crew(tuple(own)) for node_id, own in by_node.items()}

    def __getitem__(self, session_id: str) -> WorkerSession:
        return self._by_session[session_id]

    def __contains__(self, session_id: object) -> bool:
        # The mixin's own would raise and catch KeyError.
        return session_id in self._by_session

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_session)

    def __len__(self) -> int:
        return len(self._by_session)

    def values(self) -> ValuesView[WorkerSession]:
        # The mixin's own would look each of them up.
        return self._by_session.values()

    def crew(self, node_id: str) -> Crew:
        return self._crews.get(node_id, _NOBODY)

    def of(self, node_id: str) -> list[WorkerSession]:
        """The node's workers, in the order in which they came."""
        return list(self.crew(node_id).workers)

    def with_(self, worker: WorkerSession) -> Roster:
        """This one, with the worker in place of an earlier session of that id."""
        new = Roster.__new__(Roster)
        new._by_session = self._by_session.copy()
        new._by_session[worker.session_id] = worker
        new._crews = self._crews.copy()
        new._crews[worker.node_id] = self.crew(worker.node_id).with_(worker)
        return new

    def without(self, workers: Iterable[WorkerSession]) -> Roster:
        """This one, the given workers left out."""
        gone = {worker.session_id for worker in workers}
        return Roster(w for w in self._by_session.values() if w.session_id not in gone) if gone else self
