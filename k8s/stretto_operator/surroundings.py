"""What every job's objects have in common: where the controller is, and what proves who one is. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Surroundings:
    """endpoint: the controller as pods reach it. issuer_key: signs the jobs' tokens; empty: none are needed.

    ca: PEM of the authority of the controller's certificate; empty: no TLS. insecure: a token may travel without.
    """

    endpoint: str
    issuer_key: bytes = field(default=b"", repr=False)
    ca: str = ""
    insecure: bool = False


def job_token(issuer_key: bytes, job: str, nonce: str) -> str:
    """The token of the controller's job of this name; docs/operations.md says how the controller checks it.

    The same for the same arguments, so nobody has to remember it.
    """
    signature = hmac.new(issuer_key, f"job/{job}/{nonce}".encode(), hashlib.sha256).digest()
    return f"{job}.{nonce}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
