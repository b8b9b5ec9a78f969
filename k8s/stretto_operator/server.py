"""What the operator needs of an API server, and how its answers are sorted by what the caller does next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stretto_operator import names

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object and its place in the API."""

    kind: str
    plural: str
    api: str

    @property
    def api_version(self) -> str:
        return self.api.removeprefix("/apis/").removeprefix("/api/")


JOB = Kind(names.KIND, names.PLURAL, f"/apis/{names.API_VERSION}")
POD = Kind("Pod", "pods", "/api/v1")
SECRET = Kind("Secret", "secrets", "/api/v1")
EVENT = Kind("Event", "events", "/api/v1")
BUDGET = Kind("PodDisruptionBudget", "poddisruptionbudgets", "/apis/policy/v1")
LEASE = Kind("Lease", "leases", "/apis/coordination.k8s.io/v1")
KINDS = {each.kind: each for each in (JOB, POD, SECRET, EVENT, BUDGET, LEASE)}


class ApiError(Exception):
    """The API server did not do it. status: 0 when it did not answer at all."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message or reason or f"status {status}")
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def missing(self) -> bool:
        return self.status == 404

    @property
    def conflict(self) -> bool:
        """The object has changed, or is another one: look again."""
        return self.status == 409 and self.reason != "AlreadyExists"

    @property
    def exists(self) -> bool:
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def expired(self) -> bool:
        """What the watch wanted to go on from is forgotten: list again."""
        return self.status == 410

    @property
    def passing(self) -> bool:
        """The server is busy, or away: the same call may do later."""
        return self.status in (0, 408, 429) or self.status >= 500


@dataclass(frozen=True, slots=True)
class Listing:
    items: Sequence[Manifest]
    resource_version: str


@dataclass(frozen=True, slots=True)
class Change:
    """Of a watch. type: ADDED, MODIFIED, DELETED or BOOKMARK."""

    type: str
    manifest: Manifest


class Server(Protocol):
    """An API server. Every method may raise ApiError. namespace None: all of them."""

    async def list(self, kind: Kind, namespace: str | None, selector: str) -> Listing: ...

    def watch(
        self, kind: Kind, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncIterator[Change]: ...

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest: ...

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest: ...

    async def update(self, kind: Kind, manifest: Manifest) -> Manifest: ...

    async def merge_status(self, kind: Kind, namespace: str, name: str, patch: Manifest) -> Manifest: ...

    async def json_patch(self, kind: Kind, namespace: str, name: str, patch: Sequence[Manifest]) -> Manifest: ...

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str, force: bool = False) -> Manifest: ...
