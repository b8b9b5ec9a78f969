"""Every setting of the operator: flag > environment (STRETTO_OPERATOR_...) > default."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stretto_operator.diff import Pace
from stretto_operator.election import LeaseSettings
from stretto_operator.limits import Limits
from stretto_operator.surroundings import Surroundings

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SYSTEM_CA = "system"
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """namespace None: all. lease None: no other operator runs. workers: jobs that are looked at at a time."""

    endpoint: str
    around: Surroundings
    namespace: str | None = None
    lease: LeaseSettings | None = None
    http_host: str = "127.0.0.1"
    http_port: int = 8081
    poll_interval_s: float = 2.0
    workers: int = 16
    pace: Pace = field(default_factory=Pace)
    limits: Limits = field(default_factory=Limits)

    def validate(self) -> None:
        """Raises ValueError for what cannot be."""
        if not self.endpoint:
            raise ValueError("no controller was named; set STRETTO_ENDPOINT to HOST[:29400]")
        if not 0 <= self.http_port <= 65535:
            raise ValueError(f"http_port is {self.http_port}; it must be between 0 (any) and 65535")
        for name, value in (("poll_interval_s", self.poll_interval_s), ("figures_interval_s", self.pace.figures_s)):
            if not 0.1 <= value <= 3600:
                raise ValueError(f"{name} is {value}; it must be between 0.1 and 3600 seconds")
        if not 1 <= self.workers <= 1000:
            raise ValueError(f"workers is {self.workers}; it must be between 1 and 1000")
        self.limits.validate()


def own_namespace() -> str:
    """The one that this process runs in; `default` outside of pods."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip() or "default"
    except OSError:
        return "default"


def identity() -> str:
    """Who holds the Lease; another one after each start, since a restart in a pod keeps the host's name."""
    return f"{socket.gethostname()}_{os.urandom(4).hex()}"


def surroundings(endpoint: str, issuer_key_file: Path | None, environ: Mapping[str, str]) -> Surroundings:
    """What pods are told. Raises ValueError for files that cannot be used."""
    ca = environ.get("STRETTO_TLS_CA", "")
    return Surroundings(
        endpoint=endpoint,
        issuer_key=read_issuer_key(issuer_key_file) if issuer_key_file is not None else b"",
        ca="" if ca in ("", _SYSTEM_CA) else _read(Path(ca)),
        insecure=environ.get("STRETTO_INSECURE", "").lower() in ("1", "true", "yes"),
    )


def read_issuer_key(file: Path) -> bytes:
    """The key that `stretto token issuer` printed. Raises ValueError, never showing it."""
    try:
        key = bytes.fromhex(_read(file).strip())
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise ValueError(f"{file} does not hold an issuer's key; `stretto token issuer` makes one") from None
    if len(key) != _KEY_BYTES:
        raise ValueError(f"the key in {file} has {len(key)} bytes; it must have {_KEY_BYTES}")
    return key


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
