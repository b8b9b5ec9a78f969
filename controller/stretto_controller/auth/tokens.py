"""Bearer tokens: a file of hashes, read again when it changes. No token is kept, or shown, anywhere.

A line is `admin sha256:HASH`, `viewer sha256:HASH` or `job/NAME sha256:HASH`; several lines may give the same right, so
that a token can be replaced while the old one still works. Tokens are 32 random bytes, so a plain hash is enough.

A line `issuer hmac-sha256:KEY` is the key of somebody who makes jobs' tokens without asking, such as the Kubernetes
operator: NAME.NONCE.SIGNATURE, where the signature is the HMAC-SHA-256 of `job/NAME/NONCE`. With such a line the file
itself is a secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stretto_controller.auth.access import Access, Principal, Role, may_call, may_touch
from stretto_controller.core.errors import Rejected
from stretto_controller.wire import checks

_log = logging.getLogger("stretto.controller")
_LINE = re.compile(r"(admin|viewer|job/([^\s/]+))\s+sha256:([0-9a-f]{64})")
# A longer one is no token of ours, and is not hashed.
_LENGTH_LIMIT = 512
_ISSUER_LINE = re.compile(r"issuer\s+hmac-sha256:([0-9a-f]{64})")
_ISSUED = re.compile(r"([a-z0-9-]{1,63})\.([A-Za-z0-9-]{1,64})\.([A-Za-z0-9_-]{43})")

EVERYBODY = Principal(Role.ADMIN)


class Unauthenticated(Exception):
    """No token came, or none that is known. The message never holds it."""


def new_token() -> str:
    return secrets.token_urlsafe(32)


def line_of(who: Principal, token: str) -> str:
    """The line of the tokens file that gives this token its right."""
    return f"{who} sha256:{_hash(token)}"


def new_issuer_key() -> str:
    """32 random bytes, in hex."""
    return secrets.token_hex(32)


def issuer_line(key: str) -> str:
    """The line of the tokens file that lets the holder of this key make jobs' tokens."""
    return f"issuer hmac-sha256:{key}"


@dataclass(frozen=True, slots=True)
class Known:
    """What a tokens file says. hashes: of tokens, and whose they are. issuer_keys: any of them may have signed."""

    hashes: tuple[tuple[str, Principal], ...] = ()
    issuer_keys: tuple[bytes, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.hashes) + len(self.issuer_keys)

    def principal(self, token: str) -> Principal | None:
        """Whose the token is; None if nobody's. All that are known are compared: the time it takes tells nothing."""
        digest = _hash(token)
        found = None
        for known, who in self.hashes:
            if hmac.compare_digest(known, digest):
                found = who
        issued = _ISSUED.fullmatch(token)
        if issued is not None:
            for key in self.issuer_keys:
                if hmac.compare_digest(signature(key, issued[1], issued[2]), issued[3]):
                    found = Principal(Role.JOB, issued[1])
        return found


def signature(key: bytes, job: str, nonce: str) -> str:
    """What makes NAME.NONCE a token of that job: base64url, without padding."""
    signed = hmac.new(key, f"job/{job}/{nonce}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(signed).rstrip(b"=").decode()


class Tokens:
    """Who a token belongs to. file None: no tokens are asked for, and everybody is an admin."""

    def __init__(
        self, file: Path | None, reload_interval_s: float, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ValueError when the file cannot be read or says nothing."""
        self._file = file
        self._reload_interval_s = reload_interval_s
        self._monotonic_s = monotonic_s
        self._looked_s = monotonic_s()
        self._stamp = _stamp(file)
        self._known = read_tokens(file) if file is not None else Known()

    def caller(self, access: Access, authorization: str) -> Principal:
        """Who calls with this Authorization header. Raises Unauthenticated, or Rejected where they may not call it."""
        if self._file is None:
            return EVERYBODY
        who = self._principal(_token(authorization)) if authorization else None
        if may_call(access, who):
            return who or Principal(Role.VIEWER)
        if who is None:
            raise Unauthenticated(
                "the token is not known here"
                if authorization
                else "a token is needed: set STRETTO_TOKEN, or send Authorization: Bearer TOKEN"
            )
        raise Rejected.denied(f"a token of {who} may not do this: it takes {access}")

    def _principal(self, token: str) -> Principal | None:
        self._reload()
        return self._known.principal(token)

    def _reload(self) -> None:
        if self._file is None or self._monotonic_s() - self._looked_s < self._reload_interval_s:
            return
        self._looked_s = self._monotonic_s()
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._known = read_tokens(self._file)
        except ValueError as error:
            _log.error("the tokens stay as they were: %s", error)
        else:
            _log.info("read %d tokens again from %s", len(self._known), self._file)


def check_job(who: Principal, job: str) -> None:
    """Raises Rejected when the call is about a job that is not theirs."""
    if not may_touch(who, job):
        raise Rejected.denied(f"a token of {who} may not touch job {checks.shown(job)}")


def read_tokens(file: Path) -> Known:
    """What the file says. Raises ValueError, naming the line, never its content."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the tokens file {file}: {error}") from error
    found: list[tuple[str, Principal]] = []
    keys: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        issuer, match = _ISSUER_LINE.fullmatch(text), _LINE.fullmatch(text)
        if issuer is not None:
            keys.append(bytes.fromhex(issuer[1]))
            continue
        if match is None:
            raise ValueError(
                f"line {number} of {file} is not `admin sha256:HASH`, `viewer sha256:HASH`, `job/NAME sha256:HASH` or "
                "`issuer hmac-sha256:KEY`; `stretto token` makes such lines"
            )
        role = Role(match[1].partition("/")[0])
        found.append((match[3], Principal(role, match[2] or "")))
    if not found:
        raise ValueError(f"{file} holds no tokens, so nobody could call; `stretto token admin` makes the first")
    return Known(tuple(found), tuple(keys))


def _token(authorization: str) -> str:
    """The token of `Bearer TOKEN`; empty where there is none."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    return value if scheme.lower() == "bearer" and len(value) <= _LENGTH_LIMIT else ""


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """Changes when the file does."""
    try:
        status = file.stat() if file is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status is not None else None
