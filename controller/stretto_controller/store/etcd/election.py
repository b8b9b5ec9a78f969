"""Who leads: the controller that wrote the leader's key, for as long as its lease lives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from stretto_proto.v1 import etcd_pb2 as etcd

from stretto_controller.store.contents import Leader
from stretto_controller.store.etcd.connection import (
    LEASE_GRANT,
    LEASE_KEEP_ALIVE,
    LEASE_REVOKE,
    TXN,
    Connection,
    EtcdRefusedError,
    EtcdUnavailableError,
)

_log = logging.getLogger("stretto.controller")

COMPARE_CREATE = 1
# Renewals per lease time: two may fail.
_RENEWALS = 3
_RETRY_PAUSE_S = 0.1


@dataclass(slots=True)
class _Lease:
    """ends_s: counted from before etcd was asked, so never later than etcd's own end of it."""

    id: int
    time_s: float
    ends_s: float


class Election:
    """One candidate, from its start to its win, and from there until it has lost; a new attempt is a new Election."""

    def __init__(self, connection: Connection, key: bytes, lease_s: int, now_s: Callable[[], float]) -> None:
        """now_s: of a clock that also runs while this process, or its machine, is stopped."""
        self.leader = Leader()
        # Set once, for good: what was won is over.
        self.lost = asyncio.Event()
        self.reason = ""
        # Of the leader's key while it is ours: every write checks it.
        self.create_revision = 0
        self._connection = connection
        self._key = key
        self._me = Leader()
        self._lease_s = lease_s
        self._now_s = now_s
        self._lease: _Lease | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def win(self, me: Leader) -> None:
        """Return when this controller, reached at `me`, leads; until then note who does."""
        self._me = me
        while not self.create_revision:
            try:
                await self._campaign()
            except (EtcdUnavailableError, EtcdRefusedError) as error:
                # Claimed or not: the key, read again, tells.
                _log.warning("no leader could be chosen: %s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)

    def holds(self) -> bool:
        """Whether the lease lives, by our own clock: also right after this process was stopped for a while."""
        lease = self._lease
        return (
            self.create_revision > 0 and not self.lost.is_set() and lease is not None and self._now_s() < lease.ends_s
        )

    def lose(self, reason: str) -> None:
        """From now on this controller does not lead."""
        if not self.lost.is_set():
            self.reason = reason
            self.leader = Leader()
            self.lost.set()

    async def resign(self) -> None:
        """Let go of the lead, so that another need not wait for the lease to end."""
        self.lose("it has resigned")
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
        if self._lease is not None:
            with contextlib.suppress(EtcdUnavailableError, EtcdRefusedError):
                await self._connection.ask(LEASE_REVOKE, etcd.EtcdLeaseRevokeRequest(id=self._lease.id))

    async def _campaign(self) -> None:
        async with aclosing(self._connection.follow(self._key)) as values:
            async for value in values:
                claimed = value if value is not None else await self._claim()
                if self._lease is not None and claimed.lease == self._lease.id and self._now_s() < self._lease.ends_s:
                    self.create_revision, self.leader = claimed.create_revision, self._me
                    self._renewal = asyncio.create_task(self._keep(self._lease))
                    return
                self._note(claimed)

    async def _claim(self) -> etcd.EtcdKeyValue:
        """Write the key unless somebody has; whose it is now. May be repeated: the lease tells which is ours."""
        if self._lease is None or self._now_s() > self._lease.ends_s - self._lease.time_s / 2:
            asked_s = self._now_s()
            granted = await self._connection.call(LEASE_GRANT, etcd.EtcdLeaseGrantRequest(ttl=self._lease_s))
            self._lease = _Lease(granted.id, granted.ttl, asked_s + granted.ttl)
        value = json.dumps({"grpc": self._me.grpc_address, "http": self._me.http_url}).encode()
        put = etcd.EtcdPutRequest(key=self._key, value=value, lease=self._lease.id)
        absent = etcd.EtcdCompare(target=COMPARE_CREATE, key=self._key, create_revision=0)
        request = etcd.EtcdTxnRequest(
            compare=[absent],
            success=[etcd.EtcdRequestOp(request_put=put)],
            failure=[etcd.EtcdRequestOp(request_range=etcd.EtcdRangeRequest(key=self._key))],
        )
        answer: etcd.EtcdTxnResponse = await self._connection.call(TXN, request)
        if answer.succeeded:
            return etcd.EtcdKeyValue(value=value, lease=self._lease.id, create_revision=answer.header.revision)
        return answer.responses[0].response_range.kvs[0]

    async def _keep(self, lease: _Lease) -> None:
        """Renew at a third of the lease time, until it is lost."""
        renew_s = lease.ends_s - lease.time_s * (1 - 1 / _RENEWALS)
        while not self.lost.is_set():
            await asyncio.sleep(max(0.0, min(renew_s, lease.ends_s) - self._now_s()))
            left_s = lease.ends_s - self._now_s()
            if left_s <= 0:
                self.lose(f"its lease could not be renewed for {lease.time_s:g} s")
                return
            asked_s = self._now_s()
            request = etcd.EtcdLeaseKeepAliveRequest(id=lease.id)
            try:
                answer = await self._connection.ask(LEASE_KEEP_ALIVE, request, min(left_s, lease.time_s / _RENEWALS))
            except (EtcdUnavailableError, EtcdRefusedError) as error:
                _log.warning("the lease was not renewed, %.1f s are left: %s", left_s, error)
                renew_s = self._now_s() + _RETRY_PAUSE_S
                continue
            if answer.ttl <= 0:
                self.lose("etcd does not know its lease any more")
                return
            lease.ends_s = max(lease.ends_s, asked_s + answer.ttl)
            renew_s = asked_s + lease.time_s / _RENEWALS

    def _note(self, value: etcd.EtcdKeyValue) -> None:
        """Somebody else leads; ourselves of before we count as nobody."""
        try:
            plain = json.loads(value.value)
            leader = Leader(str(plain["grpc"]), str(plain["http"]))
        except (ValueError, TypeError, KeyError):
            leader = Leader()
        leader = Leader() if leader == self._me else leader
        if leader != self.leader:
            self.leader = leader
            _log.info("the leader is %s", leader.grpc_address or "not known yet")
