"""Of several operators one acts: the one that holds a Lease, and only as long as its own clock says that it does."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stretto_operator.server import LEASE, ApiError, Manifest, Server
from stretto_operator.times import to_micro_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """duration_s: who has not renewed for so long leads no longer. Renewed every third of it."""

    namespace: str
    name: str
    identity: str
    duration_s: int = 15


class Election:
    """Holds a Lease, or waits for it.

    Another's lease is over when it has not changed for its duration by our own monotonic clock: wall clocks of other
    machines are not compared. Who leads stops when two thirds of the duration have passed without a renewal.
    """

    def __init__(
        self, server: Server, settings: LeaseSettings, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._settings = settings
        self._monotonic_s = monotonic_s
        self._seen: tuple[str, float] = ("", 0.0)
        self._held: Manifest | None = None
        self._until_s = 0.0

    @property
    def leads(self) -> bool:
        return self._held is not None and self._monotonic_s() < self._until_s

    async def win(self) -> None:
        """Returns when this process leads."""
        while not await self.attempt():
            await asyncio.sleep(self._pause_s())

    async def hold(self) -> None:
        """Renews. Returns when the lead is lost."""
        while self.leads:
            await asyncio.sleep(min(self._settings.duration_s / 3, max(0.0, self._until_s - self._monotonic_s())))
            # A server that is away for a moment may be back before the time is up.
            while not await self.attempt():
                if not self.leads or self._held is None:
                    _log.error("the lead is lost: the Lease could not be renewed in time")
                    return
                await asyncio.sleep(0.2 + random.random())

    async def resign(self) -> None:
        """Let another lead at once. Never raises."""
        if not self.leads or self._held is None:
            return
        held, self._held = self._held, None
        try:
            await self._server.update(LEASE, self._manifest(held, holder=""))
        except ApiError as error:
            _log.info("the Lease was not given back: %s", error)

    async def attempt(self) -> bool:
        """Take or renew the Lease. False where that is not possible now."""
        asked_s = self._monotonic_s()
        settings = self._settings
        try:
            if self._held is not None:
                made = await self._server.update(LEASE, self._manifest(self._held, holder=settings.identity))
            else:
                taken = await self._take()
                if taken is None:
                    return False
                made = taken
        except ApiError as error:
            if error.conflict or error.missing:
                # Somebody else has taken it.
                self._held = None
            _log.debug("the Lease: %s", error)
            return False
        # From before the question, so that others never count a shorter time than we do.
        self._held, self._until_s = made, asked_s + settings.duration_s * 2 / 3
        return True

    async def _take(self) -> Manifest | None:
        """The Lease, if nobody holds it any more."""
        settings = self._settings
        try:
            found = await self._server.get(LEASE, settings.namespace, settings.name)
        except ApiError as error:
            if not error.missing:
                raise
            return await self._server.create(LEASE, self._manifest(None, holder=settings.identity))
        spec = found.get("spec") or {}
        version = found["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, self._monotonic_s())
        waited_s = self._monotonic_s() - self._seen[1]
        if spec.get("holderIdentity") and waited_s < float(spec.get("leaseDurationSeconds") or settings.duration_s):
            return None
        return await self._server.update(LEASE, self._manifest(found, holder=settings.identity))

    def _manifest(self, before: Manifest | None, *, holder: str) -> dict[str, Any]:
        """With the resource version of the one before: the server refuses it if that has changed."""
        settings, now = self._settings, to_micro_text(time.time())
        spec = dict((before or {}).get("spec") or {})
        if spec.get("holderIdentity") != holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + (1 if before else 0)
        spec |= {"holderIdentity": holder, "renewTime": now, "leaseDurationSeconds": settings.duration_s}
        version = {"resourceVersion": before["metadata"]["resourceVersion"]} if before else {}
        metadata = {"name": settings.name, "namespace": settings.namespace, **version}
        return {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}

    def _pause_s(self) -> float:
        return self._settings.duration_s / 6 * (0.5 + random.random())
