"""Every setting of the controller: flag > environment (STRETTO_...) > TOML file > default."""

from __future__ import annotations

import ipaddress
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from stretto_controller import logs
from stretto_controller.core.limits import Limits

_ENVIRONMENT_PREFIX = "STRETTO_"
_STORES = ("sqlite", "etcd")


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of the shell around the core, each with its unit and what it costs to change it."""

    # Finished jobs count until they are deleted: each keeps a record, events and history in memory.
    max_jobs: int = 1000
    # Streams of agents and workers together; about 30 KB each.
    max_sessions: int = 20_000
    # Open event streams of the HTTP API; each open page has one.
    max_watchers: int = 200
    # A stream that has not said Hello by then is ended.
    first_message_s: float = 5.0
    # A stream may send this many messages at once, and this many each second for long; more ends it.
    stream_messages_burst: int = 200
    stream_messages_per_s: float = 100.0
    # The largest request message; a Hello is under 2 KiB, a progress report under 4 KiB.
    message_size_bytes: int = 1 << 20
    # The largest HTTP request body; ours are under 100 bytes.
    body_size_bytes: int = 64 << 10
    # Actions that wait for a stream whose peer does not read; more ends it.
    outbox_length: int = 256
    # At the end of a stream, a message under way has this long to be taken.
    last_write_s: float = 1.0
    # Every job that is not finished has a tick at least this often.
    tick_interval_s: float = 0.5
    # The progress rate is measured over this long: longer is smoother and later.
    rate_window_s: float = 10.0
    # Kept per job, in the store and in memory.
    kept_events: int = 1000
    kept_generations: int = 1000
    # Points of the curves on the page: 80 bytes each. When they are full every second one goes.
    kept_points: int = 4000
    # The least between two points.
    point_interval_s: float = 1.0
    # What a kill -9 may cost of the curves; points are saved together, this far apart.
    points_saved_s: float = 10.0
    # How often open pages are told what is new.
    watch_interval_s: float = 1.0
    # How often the size of every job is looked at; half a millisecond of the controller's time for each.
    review_interval_s: float = 5.0
    # Nodes that all jobs share: those in mode act divide what the others leave. The default is no limit.
    shared_nodes: int = 1_000_000
    # Of the jobs that share nodes, at most so many change at one review; a larger number is restless,
    changes_per_review: int = 4
    # ... and none unless the sum of log-speedups grows by this: 0.02 is 2 % for one job.
    worthwhile_log_speedup: float = 0.02
    # A finished job's metrics are exported for this long.
    finished_series_s: float = 600.0
    # On a stop, streams and requests have this long to end by themselves.
    stop_grace_s: float = 1.0
    # After a failed save, /readyz and /metrics tell of it for this long before the controller exits; longer than the
    # 5 s between scrapes, or the alert on it never sees it.
    failure_shown_s: float = 6.0


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How etcd is reached. Several controllers that share endpoints and prefix are one: one of them leads."""

    # HOST:PORT, several with commas between them.
    endpoints: str = "127.0.0.1:2379"
    # Every key of ours begins with it.
    prefix: str = "/stretto/"
    # A PEM file of authorities turns TLS on; certificate and key are for clusters that ask clients for one.
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    # A file, so that the password is in no process list and in no environment.
    password_file: Path | None = None
    # A dead leader is noticed after so long; etcd allows no less than 2 s by default.
    lease_s: int = 3
    # One attempt at one endpoint; a third of lease_s lets a renewal fail over.
    request_timeout_s: float = 1.0
    # A watch without news for so long is begun again.
    watch_quiet_s: float = 2.0

    @property
    def endpoint_list(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.endpoints.split(",") if part.strip())

    def validate(self) -> None:
        """Raise ValueError, saying what was given and what is allowed."""
        if not self.endpoint_list or any(not part.rpartition(":")[2].isdecimal() for part in self.endpoint_list):
            raise ValueError(f"etcd.endpoints is {self.endpoints!r}; give HOST:PORT, or several with commas between")
        if not self.prefix.startswith("/") or not self.prefix.endswith("/"):
            raise ValueError(f"etcd.prefix is {self.prefix!r}; it must begin and end with /")
        if bool(self.user) != (self.password_file is not None):
            raise ValueError("etcd.user and etcd.password_file belong together; give both or neither")
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise ValueError("etcd.cert and etcd.key belong together, and need etcd.ca")
        if not 2 <= self.lease_s <= 60:
            raise ValueError(f"etcd.lease_s is {self.lease_s}; it must be between 2 and 60")
        for name in ("request_timeout_s", "watch_quiet_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"etcd.{name} is {getattr(self, name)}; it must be finite and above 0")


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    """Who may reach the controller, and how. Files are read again when they change."""

    # PEM: the certificate with its chain, and its key. Both: gRPC and HTTP speak TLS only.
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # PEM: only clients with a certificate of this authority are let in, on both ports.
    tls_client_ca: Path | None = None
    # Hashes of tokens (`stretto token`). Without it everybody who reaches the ports may do everything.
    tokens: Path | None = None
    # The tokens file is looked at again at most so often.
    reload_interval_s: float = 5.0

    def validate(self) -> None:
        """Raise ValueError, saying what was given and what is allowed."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if not 0 <= self.reload_interval_s < math.inf:
            raise ValueError(f"reload_interval_s is {self.reload_interval_s}; it must be finite and at least 0")


@dataclass(frozen=True, slots=True)
class Settings:
    host: str = "127.0.0.1"
    # 0 picks a free port.
    grpc_port: int = 29400
    http_port: int = 8080
    data_dir: Path = Path(".stretto/controller")
    store: str = "sqlite"
    # Serve beyond this machine without tokens or without TLS.
    insecure: bool = False
    # console, or json: one object a line.
    log_format: str = logs.CONSOLE
    # http(s)://HOST:PORT of an OpenTelemetry collector (OTLP over gRPC): traces of generation changes go there.
    trace_endpoint: str = ""
    # Written, whole, once both ports serve.
    ready_file: Path | None = None
    # HOST[:PORT] at which others reach this controller's gRPC port, told to those who ask a follower.
    advertise: str = ""
    security: SecuritySettings = field(default_factory=SecuritySettings)
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    service: ServiceLimits = field(default_factory=ServiceLimits)
    limits: Limits = field(default_factory=Limits)

    def validate(self) -> None:
        """Raise ValueError, saying what was given and what is allowed."""
        for name in ("grpc_port", "http_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                raise ValueError(f"{name} is {port}; it must be between 0 (any free port) and 65535")
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}; give two different ports")
        if self.store not in _STORES:
            raise ValueError(f"store is {self.store!r}; it must be one of {', '.join(_STORES)}")
        if self.log_format not in logs.FORMATS:
            raise ValueError(f"log_format is {self.log_format!r}; it must be one of {', '.join(logs.FORMATS)}")
        if self.trace_endpoint and not self.trace_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"trace_endpoint is {self.trace_endpoint!r}; give http://HOST:PORT or https://HOST:PORT")
        self.security.validate()
        safe = self.security.tls_cert is not None and self.security.tokens is not None
        if not self.insecure and not safe and not is_loopback(self.host):
            raise ValueError(
                f"host is {self.host!r}, which other machines can reach: give --tls-cert, --tls-key and --tokens "
                "(docs/operations.md), or use --host 127.0.0.1, or say --insecure aloud on a network that you trust"
            )
        for limit in fields(self.service):
            value = getattr(self.service, limit.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{limit.name} is {value}; it must be finite and above 0")
        self.etcd.validate()
        self.limits.validate()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether the host means every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def read_settings(flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """The validated settings. Flags that are None were not given. Raises ValueError for what is not allowed.

    Names in the environment and in the file: STRETTO_GRPC_PORT and grpc_port; STRETTO_SERVICE_MAX_JOBS and
    max_jobs in the table [service]; STRETTO_LIMITS_SETTLE_S and settle_s in the table [limits].
    """
    table = _read_file(file) if file is not None else {}
    settings = _build(Settings, flags, environment, table, prefix="", origin=str(file))
    assert isinstance(settings, Settings)
    settings.validate()
    return settings


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the settings file {file}: {error}") from error


def _build(
    kind: type, flags: Mapping[str, object], environment: Mapping[str, str], table: object, *, prefix: str, origin: str
) -> object:
    """One dataclass from all sources; nested dataclasses are tables of the file."""
    hints = get_type_hints(kind)
    if not isinstance(table, dict):
        raise ValueError(f"{prefix.rstrip('_')} in {origin} is {table!r}; it must be a table")
    unknown = table.keys() - hints.keys()
    if unknown:
        raise ValueError(
            f"{origin} has the unknown settings {', '.join(sorted(unknown))}; known here: {', '.join(sorted(hints))}"
        )
    values: dict[str, object] = {}
    for name, hint in hints.items():
        variable = f"{_ENVIRONMENT_PREFIX}{prefix}{name}".upper()
        if is_dataclass(hint):
            assert isinstance(hint, type)
            nested = flags.get(name) or {}
            assert isinstance(nested, dict)
            values[name] = _build(hint, nested, environment, table.get(name, {}), prefix=f"{name}_", origin=origin)
        elif flags.get(name) is not None:
            values[name] = flags[name]
        elif variable in environment:
            values[name] = _parsed(hint, environment[variable], variable)
        elif name in table:
            values[name] = _parsed(hint, str(table[name]), f"{prefix}{name} in {origin}")
    return kind(**values)


def _parsed(hint: Any, text: str, source: str) -> object:
    if hint is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in words:
            raise ValueError(f"{source} is {text!r}; it must be true or false")
        return words[text.lower()]
    try:
        return hint(text) if hint in (int, float, str) else Path(text)
    except ValueError as error:
        wanted = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{source} is {text!r}; it must be {wanted}") from error
