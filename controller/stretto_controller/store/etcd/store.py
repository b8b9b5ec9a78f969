"""The store in etcd: one transaction per group of saves, which counts only while this controller leads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import count, islice

from stretto_proto.v1 import etcd_pb2 as etcd

from stretto_controller.settings import EtcdSettings
from stretto_controller.store.codec import CodecError
from stretto_controller.store.contents import Leader, Save, Stored, StoreError
from stretto_controller.store.etcd.connection import RANGE, TXN, Connection, EtcdRefusedError, EtcdUnavailableError
from stretto_controller.store.etcd.election import COMPARE_CREATE, Election
from stretto_controller.store.etcd.layout import Keys, Layout, group_length, put

_log = logging.getLogger("stretto.controller")

_COMPARE_VALUE = 3
_PAGE_LENGTH = 500
_RETRY_PAUSE_S = 0.05


class EtcdStore:
    """A `Store` in etcd, for one term.

    Each write checks that the leader's key is still the one that this term began with, and that the latest write is
    the one that this store wrote last. So it may be sent again after an error that leaves its outcome open: it is
    carried out once, or, if it was before, the request id in `last_save` says so.
    """

    def __init__(
        self,
        settings: EtcdSettings,
        *,
        kept_events: int,
        kept_generations: int,
        connection: Connection | None = None,
        now_s: Callable[[], float] | None = None,
    ) -> None:
        """Raises StoreError when a file of the settings cannot be read. connection, now_s: given by simulations."""
        self._keys = Keys(settings.prefix)
        self._layout = Layout(self._keys, kept_events=kept_events, kept_generations=kept_generations)
        self._connection = connection or Connection(settings)
        self._election = Election(self._connection, self._keys.leader, settings.lease_s, now_s or _boot_time_s)
        self.lost = self._election.lost
        self._waiting: deque[tuple[Save, asyncio.Future[None]]] = deque()
        self._news = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closing = False
        self._failure: StoreError | None = None
        self._last_id = b""
        self._numbers = count(1)

    @property
    def leader(self) -> Leader:
        return self._election.leader

    @property
    def lost_reason(self) -> str:
        return self._election.reason

    async def lead(self, me: Leader) -> None:
        """Wait for the lead. Raises StoreError when etcd refuses us: credentials, rights."""
        while True:
            try:
                await self._connection.call(RANGE, etcd.EtcdRangeRequest(key=self._keys.leader))
                break
            except EtcdRefusedError as error:
                raise StoreError(f"{error}; check etcd.user, etcd.password_file and the role's prefix") from error
            except EtcdUnavailableError as error:
                # Before etcd has answered once nobody can be chosen, and a refusal may still come.
                _log.warning("no leader could be chosen: %s", error)
        await self._election.win(me)

    def leads(self) -> bool:
        return self._election.holds()

    async def load(self) -> Stored:
        """All jobs as one moment of etcd shows them."""
        try:
            values = {pair.key: pair.value for pair in await self._pages()}
            self._last_id = values.pop(self._keys.last_save, b"")
            stored = self._layout.read(sorted(values.items()))
            # The first write of a term: should a write of an earlier one still be under way, it has no effect now.
            await self._write([])
        except (EtcdUnavailableError, EtcdRefusedError, CodecError, ValueError) as error:
            raise StoreError(f"cannot read what is stored in etcd: {error}") from error
        self._writer = asyncio.create_task(self._write_all())
        return stored

    def save(self, save: Save) -> asyncio.Future[None]:
        """Queue the save. Call from the event loop."""
        saved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            saved.set_exception(self._failure)
            return saved
        assert not self._closing, "save after close"
        self._waiting.append((save, saved))
        self._news.set()
        return saved

    async def close(self) -> None:
        """Write what waits, resign, and let the connections go."""
        self._closing = True
        self._news.set()
        if self._writer is not None:
            await self._writer
        await self._election.resign()
        await self._connection.close()

    async def _pages(self) -> list[etcd.EtcdKeyValue]:
        start, end = self._keys.everything
        found: list[etcd.EtcdKeyValue] = []
        revision = 0
        while True:
            request = etcd.EtcdRangeRequest(key=start, range_end=end, limit=_PAGE_LENGTH, revision=revision)
            try:
                answer: etcd.EtcdRangeResponse = await self._connection.call(RANGE, request)
            except EtcdRefusedError as error:
                if not revision or "compacted" not in str(error):
                    raise
                # That moment is gone: read a later one.
                start, revision, found = self._keys.everything[0], 0, []
                continue
            found += answer.kvs
            if not answer.more:
                return found
            revision = answer.header.revision
            start = found[-1].key + b"\0"

    async def _write_all(self) -> None:
        """The only writer: one transaction at a time, for as many saves as fit."""
        while True:
            while not self._waiting and not self._closing:
                self._news.clear()
                await self._news.wait()
            if not self._waiting:
                return
            group = [self._waiting[0]]
            try:
                group = list(islice(self._waiting, group_length([save for save, _ in self._waiting])))
                if self._failure is None:
                    await self._write([save for save, _ in group])
            # Whatever went wrong, the answer is the same: this was not saved.
            except Exception as error:  # noqa: BLE001
                self._failure = error if isinstance(error, StoreError) else StoreError(f"cannot save: {error}")
                self._failure.__cause__ = error
            for _ in group:
                self._waiting.popleft()
            for _, saved in group:
                if saved.done():
                    continue
                if self._failure is None:
                    saved.set_result(None)
                else:
                    saved.set_exception(self._failure)

    async def _write(self, saves: list[Save]) -> None:
        """One transaction, sent until its outcome is known or the lead is lost. Raises StoreError."""
        request_id = f"{self._election.create_revision}-{next(self._numbers)}".encode()
        # In a thread: the text of a large job takes milliseconds.
        operations = await asyncio.to_thread(self._layout.operations, saves) if saves else []
        request = self._fenced(request_id, operations)
        failure = ""
        while self._election.holds():
            try:
                answer: etcd.EtcdTxnResponse = await self._connection.ask(TXN, request)
            except EtcdUnavailableError as error:
                failure = str(error)
                await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            except EtcdRefusedError as error:
                raise StoreError(f"cannot save: {error}") from error
            if not answer.succeeded:
                self._judge(answer, request_id)
            self._last_id = request_id
            return
        reason = self._election.reason or failure or "its lease has ended"
        raise StoreError(f"cannot save: this controller does not lead any more: {reason}")

    def _fenced(self, request_id: bytes, operations: list[etcd.EtcdRequestOp]) -> etcd.EtcdTxnRequest:
        keys = self._keys
        if self._last_id:
            latest = etcd.EtcdCompare(target=_COMPARE_VALUE, key=keys.last_save, value=self._last_id)
        else:
            latest = etcd.EtcdCompare(target=COMPARE_CREATE, key=keys.last_save, create_revision=0)
        ours = etcd.EtcdCompare(target=COMPARE_CREATE, key=keys.leader, create_revision=self._election.create_revision)
        return etcd.EtcdTxnRequest(
            compare=[ours, latest],
            success=[put(keys.last_save, request_id), *operations],
            failure=[
                etcd.EtcdRequestOp(request_range=etcd.EtcdRangeRequest(key=key))
                for key in (keys.leader, keys.last_save)
            ],
        )

    def _judge(self, answer: etcd.EtcdTxnResponse, request_id: bytes) -> None:
        """The comparison failed: return if an earlier attempt was carried out. Raises StoreError otherwise."""
        leader, latest = (response.response_range.kvs for response in answer.responses)
        if not leader or leader[0].create_revision != self._election.create_revision:
            self._election.lose("another controller leads, or its lease has ended")
            raise StoreError(f"cannot save: this controller does not lead any more: {self._election.reason}")
        if not latest or latest[0].value != request_id:
            found = latest[0].value.decode(errors="replace") if latest else "nothing"
            self._election.lose("something else writes under its prefix")
            raise StoreError(
                f"cannot save: the latest write is {found} and should be {self._last_id.decode() or 'none'}; something "
                f"else writes under {self._keys.prefix} in etcd: give this cluster a prefix of its own"
            )


def _boot_time_s() -> float:
    """Seconds that also pass while this process, or its machine, is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
