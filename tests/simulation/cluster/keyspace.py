"""etcd's keys as one linearizable machine: revisions, transactions, leases, watches and compaction.

Time is an argument. What a request does, it does at once and whole; what networks and members do to requests and to
answers is in `members`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc
from stretto_proto.v1 import etcd_pb2 as etcd

CREATE_REVISION, VALUE = 1, 3
PUT, DELETE = 0, 1


class Refused(Exception):
    """etcd's answer is a refusal: this was not done, and will not be."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    ends_s: float
    keys: set[bytes] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Write:
    """One transaction that was carried out: the keys it put, with what they held before (None: they were new)."""

    revision: int
    puts: tuple[tuple[bytes, bytes, bytes | None], ...]
    deleted: tuple[bytes, ...]


class Keyspace:
    """written: is told of each transaction that changed something."""

    def __init__(self, written: Callable[[Write], None]) -> None:
        self.revision = 1
        self.compacted = 0
        self._written = written
        self._now: dict[bytes, etcd.EtcdKeyValue] = {}
        # Every change since the last compaction, by revision.
        self._log: list[tuple[int, etcd.EtcdEvent]] = []
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 7000

    # -- reading

    def value(self, key: bytes) -> etcd.EtcdKeyValue | None:
        return self._now.get(key)

    def under(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """All keys that begin so, with their values, in order."""
        return [(key, self._now[key].value) for key in sorted(self._now) if key.startswith(prefix)]

    def range(self, request: etcd.EtcdRangeRequest) -> etcd.EtcdRangeResponse:
        if not request.key:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: key is not provided")
        if 0 < request.revision < self.compacted:
            raise Refused(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        pairs = self._now if not request.revision else self._at(request.revision)
        keys = sorted(_within(pairs, request.key, request.range_end))
        shown = keys[: request.limit] if request.limit else keys
        return etcd.EtcdRangeResponse(
            header=self._header(), kvs=[pairs[key] for key in shown], more=len(shown) < len(keys)
        )

    def events(self, key: bytes, first: int) -> list[tuple[int, etcd.EtcdEvent]]:
        """Changes of one key from that revision on."""
        found = []
        for revision, event in reversed(self._log):
            if revision < first:
                break
            if event.kv.key == key:
                found.append((revision, event))
        return found[::-1]

    def _at(self, revision: int) -> dict[bytes, etcd.EtcdKeyValue]:
        """The keys as they were: the changes since are taken back, newest first."""
        then = dict(self._now)
        touched = {event.kv.key for changed, event in self._log if changed > revision}
        for key in touched:
            then.pop(key, None)
        for changed, event in self._log:
            if changed <= revision and event.kv.key in touched:
                if event.type == PUT:
                    then[event.kv.key] = event.kv
                else:
                    then.pop(event.kv.key, None)
        return then

    # -- writing

    def transact(self, request: etcd.EtcdTxnRequest) -> etcd.EtcdTxnResponse:
        holds = all(self._holds(compare) for compare in request.compare)
        chosen = request.success if holds else request.failure
        responses = [
            etcd.EtcdResponseOp(response_range=self.range(operation.request_range))
            for operation in chosen
            if operation.WhichOneof("request") == "request_range"
        ]
        self._change(chosen)
        return etcd.EtcdTxnResponse(header=self._header(), succeeded=holds, responses=responses)

    def _holds(self, compare: etcd.EtcdCompare) -> bool:
        found = self._now.get(compare.key)
        if compare.target == CREATE_REVISION:
            return (found.create_revision if found else 0) == compare.create_revision
        assert compare.target == VALUE, compare
        return found is not None and found.value == compare.value

    def _change(self, operations: Iterable[etcd.EtcdRequestOp]) -> None:
        puts: list[tuple[bytes, bytes, bytes | None]] = []
        deleted: list[bytes] = []
        revision = self.revision + 1
        for operation in operations:
            kind = operation.WhichOneof("request")
            if kind == "request_put":
                request = operation.request_put
                assert request.key not in [key for key, _, _ in puts], f"{request.key!r} is put twice"
                if request.lease and request.lease not in self._leases:
                    raise Refused(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
                before = self._now.get(request.key)
                puts.append((request.key, request.value, before.value if before else None))
                self._put(request, before, revision)
            elif kind == "request_delete_range":
                found = _within(self._now, operation.request_delete_range.key, operation.request_delete_range.range_end)
                for key in sorted(found):
                    assert key not in [each for each, _, _ in puts], f"{key!r} is put and deleted"
                    self._delete(key, revision)
                    deleted.append(key)
        if puts or deleted:
            self.revision = revision
            self._written(Write(revision, tuple(puts), tuple(deleted)))

    def _put(self, request: etcd.EtcdPutRequest, before: etcd.EtcdKeyValue | None, revision: int) -> None:
        if before is not None and before.lease in self._leases:
            self._leases[before.lease].keys.discard(request.key)
        if request.lease:
            self._leases[request.lease].keys.add(request.key)
        value = etcd.EtcdKeyValue(
            key=request.key,
            value=request.value,
            create_revision=before.create_revision if before else revision,
            mod_revision=revision,
            lease=request.lease,
        )
        self._now[request.key] = value
        self._log.append((revision, etcd.EtcdEvent(type=PUT, kv=value)))

    def _delete(self, key: bytes, revision: int) -> None:
        before = self._now.pop(key)
        if before.lease in self._leases:
            self._leases[before.lease].keys.discard(key)
        gone = etcd.EtcdKeyValue(key=key, mod_revision=revision)
        self._log.append((revision, etcd.EtcdEvent(type=DELETE, kv=gone)))

    def compact(self) -> None:
        """Forget every revision but the newest."""
        self.compacted = self.revision
        latest = {event.kv.key: (revision, event) for revision, event in self._log if event.type == PUT}
        self._log = sorted((latest[key] for key in latest if key in self._now), key=lambda pair: pair[0])

    # -- leases

    def grant(self, ttl_s: int, now_s: float) -> etcd.EtcdLeaseGrantResponse:
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl_s, now_s + ttl_s)
        return etcd.EtcdLeaseGrantResponse(id=self._last_lease, ttl=ttl_s)

    def keep_alive(self, lease_id: int, now_s: float) -> etcd.EtcdLeaseKeepAliveResponse:
        lease = self._leases.get(lease_id)
        if lease is None:
            return etcd.EtcdLeaseKeepAliveResponse(id=lease_id, ttl=0)
        lease.ends_s = now_s + lease.ttl_s
        return etcd.EtcdLeaseKeepAliveResponse(id=lease_id, ttl=lease.ttl_s)

    def revoke(self, lease_id: int) -> etcd.EtcdLeaseRevokeResponse:
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            raise Refused(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
        for key in sorted(lease.keys):
            self._change([etcd.EtcdRequestOp(request_delete_range=etcd.EtcdDeleteRangeRequest(key=key))])
        return etcd.EtcdLeaseRevokeResponse()

    def expire(self, now_s: float) -> None:
        """Revoke what has run out. etcd looks twice a second."""
        for lease_id in [lease_id for lease_id, lease in self._leases.items() if lease.ends_s <= now_s]:
            self.revoke(lease_id)

    def promote(self, now_s: float) -> None:
        """etcd has a new leader: all leases begin anew."""
        for lease in self._leases.values():
            lease.ends_s = now_s + lease.ttl_s

    def _header(self) -> etcd.EtcdHeader:
        return etcd.EtcdHeader(revision=self.revision)


def _within(keys: Iterable[bytes], start: bytes, end: bytes) -> list[bytes]:
    return [key for key in keys if (start <= key < end if end else key == start)]
