"""Endpoints and gRPC channels: the one place that knows how a controller is reached."""

from __future__ import annotations

import os
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from stretto_proto.v1.types_pb2 import Leader

from stretto.credentials import Credentials

# The runtime would run handlers at each fork and log about threads; nothing of ours uses gRPC in a forked
# child. It reads this when the first channel is opened.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

DEFAULT_PORT = 29400
DEFAULT_ENDPOINT = f"127.0.0.1:{DEFAULT_PORT}"
ENDPOINT_VARIABLE = "STRETTO_ENDPOINT"
_LEADER_KEY = "stretto-leader-bin"
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # Each attempt opens its own connection: a shared one would make it wait for another's backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # torch's stores ignore HTTP proxies; the controller is their neighbour.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
    # We open each connection anew ourselves. gRPC's own retries, which come with no policy too, lose a call for ever
    # when a server that was frozen wakes and shuts down at once: not even a cancellation ends it.
    ("grpc.enable_retries", 0),
)
# A backstop for a controller that vanished without a word.
_PATIENT: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)
# Where others stand by, one that is frozen or cut off must be left about when its lease ends (3 s).
_SEVERAL: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
)


def parse_endpoints(text: str) -> tuple[str, ...]:
    """`HOST[:PORT]`, or several with commas between them, each with its port (29400 where none is given).

    An IPv6 address that carries a port needs brackets: `[::1]:29400`. Raises ValueError for anything else.
    """
    endpoints = []
    for part in (part.strip() for part in text.split(",")):
        host, port = _split(part)
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"endpoint {part!r} of {text!r} is not HOST, HOST:PORT or [IPV6]:PORT with a port in 1..65535"
            )
        endpoints.append(f"{host}:{int(port)}")
    return tuple(endpoints)


def _split(part: str) -> tuple[str, str]:
    if part.startswith("["):
        host, closed, rest = part.partition("]")
        port = rest.removeprefix(":") if rest.startswith(":") else ("" if rest else str(DEFAULT_PORT))
        return (host + closed if closed and len(host) > 1 else ""), port
    if part.count(":") > 1:
        return f"[{part}]", str(DEFAULT_PORT)
    host, colon, port = part.partition(":")
    return host, port if colon else str(DEFAULT_PORT)


def leader_of(error: grpc.RpcError) -> str:
    """HOST:PORT of the controller that leads, when the one that was asked is a follower that knows it; or nothing."""
    # A call that failed is the error itself; its stubs do not say so.
    call: Any = error
    for key, value in (call.trailing_metadata() or ()) if isinstance(call, grpc.Call) else ():
        if key == _LEADER_KEY and isinstance(value, bytes):
            try:
                return Leader.FromString(value).grpc_address
            except DecodeError:
                return ""
    return ""


def open_channel(endpoint: str, *, several: bool = False) -> grpc.Channel:
    """A channel to one controller; several: there are others. It connects when it is first used.

    Credentials come from the environment (stretto.credentials). Raises Fatal when they cannot be used.
    """
    options = (*_CHANNEL_OPTIONS, *(_SEVERAL if several else _PATIENT))
    credentials = Credentials.from_environment(os.environ)
    transport = credentials.transport()
    if transport is None:
        credentials.check_plain(endpoint)
        channel = grpc.insecure_channel(endpoint, options=options)
    else:
        channel = grpc.secure_channel(endpoint, transport, options=options)
    return credentials.signing(channel)
