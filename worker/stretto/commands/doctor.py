"""`stretto doctor`: what is wrong with a set-up, and what to do about it."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from typing import Annotated

import typer
from rich.console import Console

from stretto.channel import DEFAULT_ENDPOINT, DEFAULT_PORT, ENDPOINT_VARIABLE, parse_endpoints
from stretto.client import JobsClient
from stretto.credentials import CA_VARIABLE, SYSTEM_CA, TOKEN_VARIABLE, Credentials
from stretto.errors import Fatal, StrettoError
from stretto.session_state import PROTOCOL_VERSION

_TIMEOUT_S = 5.0
_TORCH_S = 60.0
# More than this between two machines makes their logs hard to read side by side; nothing else depends on it.
_CLOCK_LIMIT_S = 2.0
_HTTP_PORT = 8080
_CERTIFICATE_DAYS = 14
# OpenSSL's verification errors.
_NOT_YET_VALID, _EXPIRED = 9, 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. remedy: only where something is wrong."""

    ok: bool
    text: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    """Add the command to `stretto`."""
    app.command("doctor")(doctor)


def doctor(
    endpoint: Annotated[
        str | None, typer.Option(help=f"Default: the variable {ENDPOINT_VARIABLE}, then {DEFAULT_ENDPOINT}.")
    ] = None,
) -> None:
    """Say what is wrong with this machine's way to its controllers: ports, TLS, token, versions, torch, clocks."""
    console = Console(soft_wrap=True, highlight=False)
    wrong = 0
    way = examine(endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT, os.environ)
    for finding in chain(way, _torch()):
        wrong += not finding.ok
        console.print(("ok     " if finding.ok else "WRONG  ") + finding.text, markup=False)
        if finding.remedy:
            console.print(f"       -> {finding.remedy}", markup=False)
    raise typer.Exit(1 if wrong else 0)


def examine(text: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """All findings, from this machine outwards."""
    yield from _versions()
    try:
        endpoints = parse_endpoints(text)
        credentials = Credentials.from_environment(environ)
        credentials.transport()
    except (ValueError, Fatal) as error:
        yield Finding(False, str(error), f"mend {ENDPOINT_VARIABLE}, --endpoint, or the STRETTO_TLS_ variables")
        return
    reached = []
    for endpoint in endpoints:
        findings = list(_reach(endpoint, credentials))
        yield from findings
        if all(finding.ok for finding in findings):
            reached.append(endpoint)
    if not reached:
        if endpoints == (DEFAULT_ENDPOINT,):
            yield from _ports()
        return
    yield from _controllers(reached, credentials)


def _versions() -> Iterator[Finding]:
    packages = [f"{name} {_version(name) or 'is not installed'}" for name in ("stretto", "torch", "grpcio", "protobuf")]
    yield Finding(True, ", ".join([f"Python {sys.version.split()[0]}", *packages]))
    for package in ("torch", "grpcio", "protobuf"):
        least = _least(package)
        if least and (have := _version(package)) and _numbers(have) < _numbers(least):
            yield Finding(
                False,
                f"{package} {have} is older than {least}, the oldest that works",
                f"pip install '{package}>={least}'",
            )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _least(package: str) -> str:
    """The oldest version that this release says it works with; empty if it says none."""
    try:
        wanted = requires("stretto") or []
    except PackageNotFoundError:
        return ""
    found = (re.match(rf"{package}(?:\[.*\])?\s*[^;]*?>=([0-9.]+)", line) for line in wanted)
    return next((match[1] for match in found if match), "")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


# In a process of its own: torch takes seconds to import, and may not be importable at all.
_TORCH = """
import torch, torch.distributed as dist
found = [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()]
devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(", ".join(found) or "none", devices)
"""


def _torch() -> Iterator[Finding]:
    """Which backends a worker on this machine could use."""
    try:
        version("torch")
    except PackageNotFoundError:
        # A machine for the controller or the command line needs none.
        return
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_TORCH_S)
    except subprocess.TimeoutExpired:
        yield Finding(
            False, f"torch takes more than {_TORCH_S:.0f} s to import", "is the disk slow, or the machine busy?"
        )
        return
    if done.returncode:
        yield Finding(
            False,
            f"torch cannot be imported: {done.stderr.strip().splitlines()[-1]}",
            "install a build for this machine",
        )
        return
    backends, _, devices = done.stdout.strip().rpartition(" ")
    yield Finding(
        "gloo" in backends,
        f"torch's backends: {backends}; {devices} GPUs",
        "" if "gloo" in backends else "install a torch with gloo: live workers need it",
    )


def _reach(endpoint: str, credentials: Credentials) -> Iterator[Finding]:
    """Name, port, TLS: each only if the one before is well."""
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    try:
        addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)})
    except OSError as error:
        yield Finding(False, f"{host} is no name that this machine knows: {error}", "mend the name, or DNS")
        return
    try:
        with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
            yield Finding(True, f"{endpoint} ({', '.join(addresses)}) accepts connections")
            connection.settimeout(_TIMEOUT_S)
            yield _tls(connection, host, endpoint, credentials)
    except OSError as error:
        remedy = f"is `stretto controller` running there, on port {port}, with a --host that others can reach?"
        if isinstance(error, TimeoutError):
            remedy = "a firewall drops the packets, or the machine is down"
        yield Finding(False, f"{endpoint} ({', '.join(addresses)}) cannot be reached: {error}", remedy)


def _tls(connection: socket.socket, host: str, endpoint: str, credentials: Credentials) -> Finding:
    if not credentials.ca:
        if _speaks_tls(connection):
            return Finding(False, f"{endpoint} speaks TLS", f"set {CA_VARIABLE} to its authority's PEM file")
        if _speaks_http(host, int(endpoint.rpartition(":")[2])):
            return Finding(
                False,
                f"{endpoint} is an HTTP server, of a controller's page perhaps, and no gRPC port",
                f"give the controller's gRPC port, by default {DEFAULT_PORT}",
            )
        return Finding(True, f"{endpoint} speaks plain text, as is expected without {CA_VARIABLE}")
    try:
        context = ssl.create_default_context(cafile=None if credentials.ca == SYSTEM_CA else credentials.ca)
        if credentials.cert:
            context.load_cert_chain(credentials.cert, credentials.key)
    except (OSError, ssl.SSLError) as error:
        return Finding(
            False, f"the files that the STRETTO_TLS_ variables name cannot be used: {error}", "give PEM files that fit"
        )
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            certificate = secured.getpeercert() or {}
            if not _goes_on(secured):
                return Finding(
                    False,
                    f"{endpoint} lets only clients with a certificate in, and "
                    + ("refuses this one's" if credentials.cert else "this one has none"),
                    "set STRETTO_TLS_CERT and STRETTO_TLS_KEY to a certificate of the authority that it trusts",
                )
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
            return Finding(
                False,
                f"{endpoint} has a certificate that is out of its time by this machine's clock: {error.verify_message}",
                "renew it there, or mend this machine's clock",
            )
        names = f"the certificate is not for {host}" in error.verify_message or error.verify_code in (62, 64)
        if names:
            return Finding(
                False,
                f"{endpoint} has a certificate for another name: {error.verify_message}",
                f"use a name that the certificate has, or have {host} added to it (subjectAltName)",
            )
        return Finding(
            False,
            f"{endpoint} has a certificate that {credentials.ca} does not vouch for: {error.verify_message}",
            f"set {CA_VARIABLE} to the authority that signed it",
        )
    except (ssl.SSLError, OSError) as error:
        return Finding(
            False, f"{endpoint} does not speak TLS: {error}", f"unset {CA_VARIABLE}, or start it with --tls-cert"
        )
    ends_s = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    left_days = (ends_s - time.time()) / 86400
    if left_days < _CERTIFICATE_DAYS:
        return Finding(False, f"{endpoint}'s certificate ends in {left_days:.0f} days", "renew it")
    return Finding(True, f"{endpoint} speaks TLS, with a certificate for {left_days:.0f} days more")


def _speaks_tls(connection: socket.socket) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection):
            return True
    except ssl.SSLError as error:
        # It asked for a certificate of ours: TLS all the same.
        return "CERTIFICATE" in str(error).upper()
    except OSError:
        return False


def _goes_on(secured: ssl.SSLSocket) -> bool:
    """Whether the server speaks after the handshake, as gRPC does; one that misses a certificate hangs up instead."""
    try:
        return bool(secured.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False


def _speaks_http(host: str, port: int) -> bool:
    """Whether HTTP/1 is answered there; gRPC does not know it."""
    try:
        with socket.create_connection((host, port), _TIMEOUT_S) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


def _controllers(endpoints: list[str], credentials: Credentials) -> Iterator[Finding]:
    """What each controller says of itself, and whether one of them leads."""
    leading = []
    with JobsClient(",".join(endpoints), timeout_s=_TIMEOUT_S) as client:
        for endpoint in endpoints:
            asked_s = time.time()
            try:
                said = client.controller(endpoint)
            except StrettoError as error:
                remedy = "see the controller's log"
                if "token" in str(error):
                    remedy = (
                        f"mend {TOKEN_VARIABLE}: `stretto token` makes one, its line goes into the tokens file"
                        if credentials.token
                        else f"set {TOKEN_VARIABLE}"
                    )
                yield Finding(False, f"{endpoint} refuses: {error}", remedy)
                continue
            answered_s = time.time()
            if said.protocol_version != PROTOCOL_VERSION:
                yield Finding(
                    False,
                    f"{endpoint} is stretto {said.version}, protocol {said.protocol_version}; this one speaks "
                    f"{PROTOCOL_VERSION}",
                    "install the same release on both sides",
                )
            else:
                state = "it leads" if said.ready else f"it does not decide: {said.reason}"
                yield Finding(True, f"{endpoint} is stretto {said.version}; {state}")
            ahead_s = said.time_s - (asked_s + answered_s) / 2
            if abs(ahead_s) > _CLOCK_LIMIT_S + (answered_s - asked_s):
                yield Finding(False, f"{endpoint}'s clock is {ahead_s:+.1f} s off this one", "run NTP on both machines")
            if said.ready:
                leading.append(endpoint)
        if not leading:
            yield Finding(False, "no controller leads", "see /readyz and the logs of the controllers; is etcd well?")


def _ports() -> Iterator[Finding]:
    """For a controller that is yet to be started on this machine."""
    for port, use in ((DEFAULT_PORT, "gRPC"), (_HTTP_PORT, "HTTP")):
        free = _is_free(port)
        yield Finding(
            free,
            f"port {port} of this machine, for {use}, is {'free' if free else 'in use'}",
            "" if free else "end what uses it, or give the controller another port",
        )


def _is_free(port: int) -> bool:
    listen: Callable[..., socket.socket] = socket.create_server
    try:
        listen(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
