"""Calls to one etcd cluster, on etcd's v3 gRPC API: which endpoint answers, who we are, what a failure means.

Nothing here repeats a write whose outcome is not known; `call` is for requests that may be done twice.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from stretto_proto.v1 import etcd_pb2 as etcd

from stretto_controller.settings import EtcdSettings
from stretto_controller.store.contents import StoreError

_log = logging.getLogger("stretto.controller")

EVENT_DELETE = 1
# A member that lost its leader refuses at once, instead of answering late or never.
_HAS_LEADER = ("hasleader", "true")
# etcd did not do it and will not: its answer says why. After any other failure it may have been done.
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
# The token has expired, its member was restarted, or rights have changed since: a new one will do.
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old", "user name is empty")
_RETRY_PAUSE_S = 0.1
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    # An endpoint that comes back is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # etcd allows a ping every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
)


# An endpoint and what to prove who one is with -> a channel to it.
OpenChannel = Callable[[str, grpc.ChannelCredentials | None], grpc.aio.Channel]


class EtcdUnavailableError(Exception):
    """No answer in time. Whether the request was, or will be, carried out is not known."""


class EtcdRefusedError(Exception):
    """etcd answered that it does not do this, and why."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Method:
    """One method of etcd's services. path: as on the wire."""

    path: str
    answer: type[Message]


RANGE = Method("/etcdserverpb.KV/Range", etcd.EtcdRangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", etcd.EtcdTxnResponse)
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", etcd.EtcdLeaseGrantResponse)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", etcd.EtcdLeaseRevokeResponse)
LEASE_KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", etcd.EtcdLeaseKeepAliveResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", etcd.EtcdWatchResponse)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", etcd.EtcdAuthenticateResponse)


class Connection:
    """One channel per endpoint; the one that answered last is asked first."""

    def __init__(self, settings: EtcdSettings, open_channel: OpenChannel | None = None) -> None:
        """Raises StoreError when a file of the settings cannot be read. open_channel: gRPC's, or a simulation's."""
        self._settings = settings
        self._password = _read(settings.password_file).decode().strip() if settings.password_file else ""
        self._token = ""
        credentials = _credentials(settings)
        self._channels = [(open_channel or _channel)(endpoint, credentials) for endpoint in settings.endpoint_list]
        self._position = 0

    async def call(self, method: Method, request: Message, limit_s: float | None = None) -> Any:
        """As `ask`, at one endpoint after the other until one answers or limit_s (a round of all) has passed."""
        limit_s = self._settings.request_timeout_s * (len(self._channels) + 1) if limit_s is None else limit_s
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + limit_s
        while True:
            try:
                return await self.ask(method, request)
            except EtcdUnavailableError:
                if loop.time() >= deadline_s:
                    raise
                await asyncio.sleep(_RETRY_PAUSE_S)

    async def ask(self, method: Method, request: Message, timeout_s: float | None = None) -> Any:
        """One attempt at one endpoint. Raises EtcdRefusedError or EtcdUnavailableError; then the next one is next."""
        timeout_s = self._settings.request_timeout_s if timeout_s is None else timeout_s
        for attempt in itertools.count():
            position = self._position
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._once(method, request)
            except TimeoutError as error:
                raise self._unavailable(position, "it did not answer in time") from error
            except grpc.RpcError as error:
                failure = self._failure(error, position)
                if isinstance(failure, EtcdRefusedError) and self._outdated(failure) and attempt == 0:
                    self._token = ""
                    continue
                raise failure from error
        raise AssertionError("count ends never")

    async def get(self, key: bytes) -> tuple[etcd.EtcdKeyValue | None, int]:
        """The key as it is now, None if it is not there; and the revision at which that was so."""
        answer: etcd.EtcdRangeResponse = await self.call(RANGE, etcd.EtcdRangeRequest(key=key))
        return (answer.kvs[0] if answer.kvs else None), answer.header.revision

    async def follow(self, key: bytes) -> AsyncGenerator[etcd.EtcdKeyValue | None, None]:
        """The key as it is now, then each change; None where it is not there. Never ends, whatever happens to etcd.

        After a break it goes on with the change after the last that was seen. Changes that etcd has compacted
        meanwhile are skipped: the present value follows.
        """
        next_revision, told = 0, ""
        while True:
            try:
                if not next_revision:
                    value, revision = await self.get(key)
                    yield value
                    next_revision = revision + 1
                async with aclosing(self._watch(key, next_revision)) as responses:
                    async for response in responses:
                        for event in response.events:
                            # Never header.revision: events up to it may still be on their way.
                            next_revision = event.kv.mod_revision + 1
                            yield None if event.type == EVENT_DELETE else event.kv
                        if response.canceled:
                            next_revision = 0
                            await asyncio.sleep(_RETRY_PAUSE_S)
                            break
            except (EtcdUnavailableError, EtcdRefusedError) as error:
                if str(error) != told:
                    told = str(error)
                    _log.warning("%s", told)
                await asyncio.sleep(_RETRY_PAUSE_S)
            except TimeoutError:
                # Quiet, or dead without a word: the present value tells.
                next_revision = 0

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def _watch(self, key: bytes, revision: int) -> AsyncGenerator[etcd.EtcdWatchResponse, None]:
        """Responses of one watch stream. Raises TimeoutError when nothing comes for `watch_quiet_s`."""
        create = etcd.EtcdWatchCreateRequest(key=key, start_revision=revision)
        position = self._position
        call: Any = None
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                metadata = await self._metadata()
            position = self._position
            call = self._stream(WATCH)(metadata=metadata)
            await call.write(etcd.EtcdWatchRequest(create_request=create))
            while True:
                async with asyncio.timeout(self._settings.watch_quiet_s):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    raise self._unavailable(position, "it ended the watch")
                yield response
        except grpc.RpcError as error:
            failure = self._failure(error, position)
            if isinstance(failure, EtcdRefusedError) and self._outdated(failure):
                self._token = ""
            raise failure from error
        finally:
            if call is not None:
                call.cancel()

    async def _once(self, method: Method, request: Message) -> Any:
        metadata = await self._metadata() if method is not AUTHENTICATE else (_HAS_LEADER,)
        if method is not LEASE_KEEP_ALIVE:
            unary: Any = self._channels[self._position].unary_unary(
                method.path, request_serializer=_serialize, response_deserializer=method.answer.FromString
            )
            return await unary(request, metadata=metadata)
        # etcd renews leases on a stream only; a stream of one message fails over like any other request.
        call = self._stream(method)(metadata=metadata)
        try:
            await call.write(request)
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise self._unavailable(self._position, "it ended the lease's stream")
            return answer
        finally:
            call.cancel()

    def _stream(self, method: Method) -> Any:
        return self._channels[self._position].stream_stream(
            method.path, request_serializer=_serialize, response_deserializer=method.answer.FromString
        )

    async def _metadata(self) -> tuple[tuple[str, str], ...]:
        if not self._settings.user:
            return (_HAS_LEADER,)
        if not self._token:
            request = etcd.EtcdAuthenticateRequest(name=self._settings.user, password=self._password)
            self._token = (await self._once(AUTHENTICATE, request)).token
        return (_HAS_LEADER, ("token", self._token))

    def _outdated(self, failure: EtcdRefusedError) -> bool:
        return bool(self._settings.user) and any(words in str(failure) for words in _STALE_TOKEN)

    def _failure(self, error: grpc.RpcError, position: int) -> EtcdRefusedError | EtcdUnavailableError:
        code, details = error.code(), error.details() or str(error)
        if code in _REFUSALS:
            return EtcdRefusedError(code, f"etcd at {self._settings.endpoint_list[position]} refuses: {details}")
        return self._unavailable(position, details)

    def _unavailable(self, position: int, reason: str) -> EtcdUnavailableError:
        """The error; the next endpoint is asked from now on, unless another caller has turned to it already."""
        if self._position == position:
            self._position = (position + 1) % len(self._channels)
        return EtcdUnavailableError(f"etcd at {self._settings.endpoint_list[position]}: {reason}")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _channel(endpoint: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
    return grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)


def _credentials(settings: EtcdSettings) -> grpc.ChannelCredentials | None:
    if settings.ca is None:
        return None
    certificate = _read(settings.cert) if settings.cert else None
    key = _read(settings.key) if settings.key else None
    return grpc.ssl_channel_credentials(_read(settings.ca), key, certificate)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}, which the settings of etcd name: {error.strerror}") from error
