"""Deliberate faults in election, store and runner, each of which the invariants must find.

As simulation.mutations: one function is replaced, by what `make` returns when given the original.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

from simulation.mutations import Mutation
from stretto_controller.core.actions import Assign
from stretto_controller.ledger import Job, Release
from stretto_controller.runner import Runner
from stretto_controller.snapshot import JobView
from stretto_controller.store.contents import Save, Stored
from stretto_controller.store.database import Database
from stretto_controller.store.etcd.connection import TXN, Connection, EtcdUnavailableError
from stretto_controller.store.etcd.election import Election
from stretto_controller.store.etcd.layout import Layout
from stretto_controller.store.etcd.store import EtcdStore
from stretto_proto.v1 import etcd_pb2 as etcd


def _with_compares(*kept: int) -> Callable[[Any], Any]:
    """Transactions check only these of (the leader's key, the write before)."""

    def make(original: Any) -> Any:
        def fenced(self: EtcdStore, request_id: bytes, operations: list[etcd.EtcdRequestOp]) -> etcd.EtcdTxnRequest:
            request: etcd.EtcdTxnRequest = original(self, request_id, operations)
            compares = [request.compare[position] for position in kept]
            del request.compare[:]
            request.compare.extend(compares)
            return request

        return fenced

    return make


def _silence_is_success(_: Any) -> Any:
    async def write(self: EtcdStore, saves: list[Save]) -> None:
        request_id = f"{self._election.create_revision}-{next(self._numbers)}".encode()
        operations = self._layout.operations(saves) if saves else []
        try:
            await self._connection.ask(TXN, self._fenced(request_id, operations))
        except EtcdUnavailableError:
            return
        self._last_id = request_id

    return write


def _repeats_blindly(_: Any) -> Any:
    async def write(self: EtcdStore, saves: list[Save]) -> None:
        operations = self._layout.operations(saves) if saves else []
        while self._election.holds():
            request_id = f"{self._election.create_revision}-{next(self._numbers)}".encode()
            request = self._fenced(request_id, operations)
            del request.compare[1:]
            try:
                await self._connection.ask(TXN, request)
            except EtcdUnavailableError:
                continue
            return

    return write


def _a_second_too_long(_: Any) -> Any:
    def holds(self: Election) -> bool:
        lease = self._lease
        leads = self.create_revision > 0 and not self.lost.is_set() and lease is not None
        return leads and lease is not None and self._now_s() < lease.ends_s + 1.0

    return holds


def _always_once_won(_: Any) -> Any:
    def holds(self: Election) -> bool:
        return self.create_revision > 0 and not self.lost.is_set()

    return holds


def _takes_a_lead_that_is_taken(original: Any) -> Any:
    async def claim(self: Election) -> etcd.EtcdKeyValue:
        call = self._connection.call

        async def unconditional(method: Any, request: Any, limit_s: float | None = None) -> Any:
            if method is TXN:
                del request.compare[:]
            return await call(method, request, limit_s)

        self._connection.call = unconditional  # type: ignore[method-assign]  # for this one call
        try:
            value: etcd.EtcdKeyValue = await original(self)
        finally:
            self._connection.call = call  # type: ignore[method-assign]  # as above
        return value

    return claim


def _sleeps_through_a_compaction(original: Any) -> Any:
    async def watch(self: Connection, key: bytes, revision: int) -> AsyncGenerator[etcd.EtcdWatchResponse, None]:
        async for response in original(self, key, revision):
            if response.canceled:
                await asyncio.sleep(3600.0)
            yield response

    return watch


def _never_asks_again(original: Any) -> Any:
    async def watch(self: Connection, key: bytes, revision: int) -> AsyncGenerator[etcd.EtcdWatchResponse, None]:
        try:
            async for response in original(self, key, revision):
                yield response
        except TimeoutError:
            await asyncio.sleep(3600.0)

    return watch


def _sends_unsaved(_: Any) -> Any:
    def let_go(self: Runner, job: Job) -> None:
        while job.releases:
            release = job.releases.popleft()
            job.show(release)
            for action in release.actions:
                self.sessions.send(job.name, action)

    return let_go


def _sends_twice(original: Any) -> Any:
    def note(self: Job, *args: Any) -> Release:
        release: Release = original(self, *args)
        renumbered = [
            replace(action, generation=replace(action.generation, number=action.generation.number + 1))
            for action in release.actions
            if isinstance(action, Assign)
        ]
        release.actions = (*release.actions, *renumbered)
        return release

    return note


async def _at_once(self: Runner, name: str) -> None:
    """Waits for nothing."""


def _unless_it_failed(_: Any) -> Any:
    async def settled(self: Runner, name: str) -> None:
        saved = self._saves.get(name)
        if saved is not None:
            await asyncio.wait([saved])

    return settled


def _hides_at_once(_: Any) -> Any:
    def view(self: Runner, name: str, now_s: float) -> JobView | None:
        job = self._jobs.get(name)
        return job.view(now_s) if job is not None else None

    return view


def _without_jobs(original: Any) -> Any:
    def start(self: Runner, stored: Stored) -> None:
        original(self, replace(stored, jobs=()))

    return start


def _numbers_anew(original: Any) -> Any:
    def load(self: Any, *args: Any) -> Stored:
        stored: Stored = original(self, *args)
        return replace(stored, last_sequence=0)

    return load


def _without_generation(original: Any) -> Any:
    """A record as of before its generation."""

    def load(self: Any, *args: Any) -> Stored:
        stored: Stored = original(self, *args)
        jobs = tuple(
            replace(job, record=replace(job.record, next_generation=max(1, job.record.next_generation - 1)))
            for job in stored.jobs
        )
        return replace(stored, jobs=jobs)

    return load


def _nothing(_: Any) -> Any:
    return lambda *args, **kwargs: None


MUTATIONS = {
    "no-fence": Mutation("writes check nothing", EtcdStore, "_fenced", _with_compares()),
    "no-chain": Mutation("writes check the leader's key alone", EtcdStore, "_fenced", _with_compares(0)),
    "no-leader-check": Mutation("writes check the write before alone", EtcdStore, "_fenced", _with_compares(1)),
    "silence-is-success": Mutation("no answer is taken for a good one", EtcdStore, "_write", _silence_is_success),
    "repeats-blindly": Mutation("after no answer it is written anew", EtcdStore, "_write", _repeats_blindly),
    "believes-in-its-failure": Mutation("a failed comparison is success", EtcdStore, "_judge", _nothing),
    "lease-too-long": Mutation("a lease is trusted for a second more", Election, "holds", _a_second_too_long),
    "leads-for-good": Mutation("who has won does not look at its lease", Election, "holds", _always_once_won),
    "claims-blindly": Mutation("a lead is taken that another has", Election, "_claim", _takes_a_lead_that_is_taken),
    "hangs-on-compaction": Mutation(
        "a compacted watch is not begun again", Connection, "_watch", _sleeps_through_a_compaction
    ),
    "trusts-a-quiet-watch": Mutation("a silent watch is not begun again", Connection, "_watch", _never_asks_again),
    "sent-before-saved": Mutation("actions go out before the save", Runner, "_let_go", _sends_unsaved),
    "says-more-than-it-saved": Mutation("an assignment that is nowhere saved", Job, "note", _sends_twice),
    "answered-before-saved": Mutation("requests are answered before the save", Runner, "settled", lambda _: _at_once),
    "answered-though-lost": Mutation("a failed save is answered well", Runner, "settled", _unless_it_failed),
    "speaks-unasked": Mutation(
        "nobody asks whether it leads before it speaks", Runner, "refuse_unless_leading", _nothing
    ),
    "deleted-before-saved": Mutation("a deletion is seen before it is saved", Runner, "_view", _hides_at_once),
    "forgets-jobs": Mutation("a new leader knows no jobs", Runner, "start", _without_jobs),
    "numbers-anew-in-etcd": Mutation("event numbers begin again", Layout, "read", _numbers_anew),
    "numbers-anew-on-disk": Mutation("event numbers begin again", Database, "load", _numbers_anew),
    "generation-again-in-etcd": Mutation("a number is given out again", Layout, "read", _without_generation),
    "generation-again-on-disk": Mutation("a number is given out again", Database, "load", _without_generation),
}
