"""Certificate authorities and certificates for tests, made by openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness.installed import installed


@dataclass(frozen=True, slots=True)
class Issued:
    cert: Path
    key: Path


class Authority:
    """Signs certificates; `ca` is what its friends trust."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._issued = 0
        directory.mkdir(parents=True, exist_ok=True)
        self.ca, self._key = directory / f"{name}.pem", directory / f"{name}.key"
        _openssl(
            *("req", "-x509", "-subj", f"/CN={name}", "-days", "30", "-out", str(self.ca), "-keyout", str(self._key)),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        )

    def issue(self, name: str, days: int = 30) -> Issued:
        """A certificate for an address such as IP:127.0.0.1 or DNS:example.org, of servers and clients."""
        self._issued += 1
        stem = self._directory / f"{self.ca.stem}-{self._issued}"
        request, extensions = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        issued = Issued(stem.with_suffix(".pem"), stem.with_suffix(".key"))
        extensions.write_text(f"subjectAltName={name}\n")
        _openssl(
            *("req", "-subj", f"/CN=number {self._issued}", "-out", str(request), "-keyout", str(issued.key)),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        )
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key), "-CAcreateserial"),
            *("-days", str(days), "-extfile", str(extensions), "-out", str(issued.cert)),
        )
        return issued


def _openssl(*arguments: str) -> None:
    subprocess.run([installed("openssl"), *arguments], check=True, capture_output=True)
