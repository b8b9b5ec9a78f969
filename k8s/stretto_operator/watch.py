"""Keeps a cache true: list, then watch, and list again whenever the watch cannot go on."""

from __future__ import annotations

import asyncio
import logging
import random

from stretto_operator.cache import Cache
from stretto_operator.server import ApiError, Server

_log = logging.getLogger(__name__)


class Watch:
    """One kind of objects, as long as `run` runs. `synced` is set once the first list is there."""

    def __init__(self, server: Server, cache: Cache, namespace: str | None, selector: str) -> None:
        self._server = server
        self._cache = cache
        self._namespace = namespace
        self._selector = selector
        self.synced = asyncio.Event()

    async def run(self, *, max_backoff_s: float = 30.0) -> None:
        """Never returns. Whatever goes wrong is logged and tried again, ever less often."""
        failures, version = 0, ""
        while True:
            try:
                if not version:
                    listing = await self._server.list(self._cache.kind, self._namespace, self._selector)
                    self._cache.replace(listing.items)
                    version = listing.resource_version
                    self.synced.set()
                async for change in self._server.watch(self._cache.kind, self._namespace, self._selector, version):
                    failures = 0
                    version = change.manifest["metadata"]["resourceVersion"]
                    if change.type == "DELETED":
                        self._cache.remove(change.manifest)
                    elif change.type != "BOOKMARK":
                        self._cache.put(change.manifest)
                told, least_s = "", 0.0
            except ApiError as error:
                told, least_s = str(error), error.retry_after_s
                if not error.passing:
                    # Expired, most often: what happened meanwhile is forgotten there.
                    version = ""
            # Watches end every few minutes; one that ends at once, again and again, must not keep us busy.
            failures += 1
            pause_s = max(least_s, random.uniform(0, min(max_backoff_s, 0.1 * 2.0 ** min(failures, 20))))
            if told:
                _log.warning("watching %s: %s; again in %.1f s", self._cache.kind.plural, told, pause_s)
            await asyncio.sleep(pause_s)
