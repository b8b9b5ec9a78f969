"""How agents, workers and tools show who they are, and whom they believe: four environment variables. No torch here."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from stretto.errors import Fatal

TOKEN_VARIABLE = "STRETTO_TOKEN"
# A PEM file of authorities; `system` for those that this machine trusts anyway.
CA_VARIABLE = "STRETTO_TLS_CA"
# For controllers that ask for a certificate (mTLS).
CERT_VARIABLE, KEY_VARIABLE = "STRETTO_TLS_CERT", "STRETTO_TLS_KEY"
INSECURE_VARIABLE = "STRETTO_INSECURE"
VARIABLES = (TOKEN_VARIABLE, CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE)
SYSTEM_CA = "system"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the environment says. An empty ca: no TLS."""

    token: str = field(default="", repr=False)
    ca: str = ""
    cert: str = ""
    key: str = ""
    insecure: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Credentials:
        """Raises Fatal for a half that misses its other half."""
        token, ca, cert, key = (environ.get(name, "").strip() for name in VARIABLES)
        if bool(cert) != bool(key) or (cert and not ca):
            raise Fatal(f"{CERT_VARIABLE} and {KEY_VARIABLE} belong together, and need {CA_VARIABLE}")
        return cls(token, ca, cert, key, environ.get(INSECURE_VARIABLE, "").lower() in ("1", "true", "yes"))

    def transport(self) -> grpc.ChannelCredentials | None:
        """TLS as the variables say; None without. Raises Fatal when a file cannot be read."""
        if not self.ca:
            return None
        roots = None if self.ca == SYSTEM_CA else _read(self.ca, CA_VARIABLE)
        key = _read(self.key, KEY_VARIABLE) if self.key else None
        return grpc.ssl_channel_credentials(roots, key, _read(self.cert, CERT_VARIABLE) if self.cert else None)

    def check_plain(self, endpoint: str) -> None:
        """Raises Fatal where the token would travel in the open."""
        if self.token and not self.insecure and not _is_loopback(endpoint):
            raise Fatal(
                f"{TOKEN_VARIABLE} would travel to {endpoint} readable for everybody on the way: set {CA_VARIABLE} to "
                f"the authority of the controller's certificate, or {INSECURE_VARIABLE}=1 on a network that you trust"
            )

    def signing(self, channel: grpc.Channel) -> grpc.Channel:
        """The channel, with the token on every call."""
        return grpc.intercept_channel(channel, _Bearer(self.token)) if self.token else channel


class _Details(NamedTuple):
    """gRPC's ClientCallDetails, which has no constructor of its own."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._signed(details), request)

    def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        return continuation(self._signed(details), requests)

    def _signed(self, details: Any) -> _Details:
        return _Details(
            details.method,
            details.timeout,
            [*(details.metadata or ()), self._header],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


def _read(path: str, variable: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Fatal(f"cannot read {path}, which {variable} names: {error.strerror}") from error


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
