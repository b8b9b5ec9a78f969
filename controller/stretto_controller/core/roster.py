"""The worker streams of one job, by session and by node: an immutable mapping.

Each decision asks every node for its own workers; looking through all workers for each would be quadratic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stretto_controller.core.model import WorkerSession


class Roster(Mapping[str, "WorkerSession"]):
    """Worker sessions by session id; `of` gives those of one node. Changes make a new one."""

    __slots__ = ("_by_node", "_by_session")

    def __init__(self, workers: Iterable[WorkerSession] = ()) -> None:
        self._by_session = {worker.session_id: worker for worker in workers}
        self._by_node: dict[str, dict[str, WorkerSession]] = {}
        for worker in self._by_session.values():
            self._by_node.setdefault(worker.node_id, {})[worker.session_id] = worker

    def __getitem__(self, session_id: str) -> WorkerSession:
        return self._by_session[session_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_session)

    def __len__(self) -> int:
        return len(self._by_session)

    def values(self) -> ValuesView[WorkerSession]:
        # The mixin's own would look each of them up.
        return self._by_session.values()

    def of(self, node_id: str) -> list[WorkerSession]:
        """The node's workers, in the order in which they came."""
        return list(self._by_node.get(node_id, {}).values())

    def with_(self, worker: WorkerSession) -> Roster:
        """This one, with the worker in place of an earlier session of that id."""
        new = Roster()
        new._by_session = {**self._by_session, worker.session_id: worker}
        own = {**self._by_node.get(worker.node_id, {}), worker.session_id: worker}
        new._by_node = {**self._by_node, worker.node_id: own}
        return new

    def without(self, workers: Iterable[WorkerSession]) -> Roster:
        """This one, the given workers left out."""
        gone = {worker.session_id for worker in workers}
        return Roster(w for w in self._by_session.values() if w.session_id not in gone) if gone else self
