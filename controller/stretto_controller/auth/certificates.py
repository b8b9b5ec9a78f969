"""TLS: one certificate for gRPC and HTTP, read again when its files change, so that renewal needs no restart."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

_log = logging.getLogger("stretto.controller")


@dataclass(frozen=True, slots=True)
class _Read:
    """The files' content, of one moment."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """The server's certificate and key; with client_ca only clients with a certificate of that authority (mTLS).

    Looked after at each handshake. Files that do not fit together yet are left alone until they do.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Raises ValueError when the files cannot be used."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        # gRPC asks on threads of its own.
        self._lock = threading.Lock()
        self._refused: _Read | None = None
        try:
            self._read = self._files()
            self._context = self._new_context()
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot serve TLS with {cert} and {key}: {error}") from error

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files."""
        served = self._read

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            newest = self._newest()
            if newest is served:
                return None
            served = newest
            return _configuration(served)

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(served),
            fetch,  # type: ignore[arg-type]  # None means unchanged, which the stubs do not know
            self._client_ca is not None,
        )
        return credentials

    def http_context(self) -> ssl.SSLContext:
        """A context whose handshakes follow the files."""
        context = self._context

        def choose(handshake: Any, name: str | None, initial: ssl.SSLContext) -> None:
            self._newest()
            handshake.context = self._context

        context.sni_callback = choose
        return context

    def _newest(self) -> _Read:
        with self._lock:
            try:
                found = self._files()
                if found not in (self._read, self._refused):
                    self._refused = found
                    self._context = self._new_context()
                    self._read = found
                    _log.info("serving TLS with the new certificate in %s", self._cert)
            except (OSError, ssl.SSLError) as error:
                _log.error("TLS goes on with the old certificate; the new files cannot be used: %s", error)
            return self._read

    def _files(self) -> _Read:
        client_ca = self._client_ca.read_bytes() if self._client_ca is not None else None
        return _Read(self._cert.read_bytes(), self._key.read_bytes(), client_ca)

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._client_ca)
        return context


def _configuration(read: _Read) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(read.key, read.cert)], read.client_ca)
