"""One operator: waits for the lead, then watches and reconciles until it is stopped or loses it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import Any

from aiohttp import web
from stretto.client import JobsClient

from stretto_operator import names
from stretto_operator.controller import PolledController
from stretto_operator.election import Election
from stretto_operator.queue import Queue
from stretto_operator.reconciler import Policy, Reconciler
from stretto_operator.server import Server
from stretto_operator.settings import Settings
from stretto_operator.watch import Watch

_log = logging.getLogger(__name__)


class OperatorProcess:
    """Runs until `stop`. One that lost the lead ends as well, so that nothing of its time goes on."""

    def __init__(self, server: Server, settings: Settings) -> None:
        self._server = server
        self._settings = settings
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> bool:
        """False when the lead was lost."""
        lease = self._settings.lease
        if lease is None:
            await self._operate(None)
            return True
        election = Election(self._server, lease)
        _log.info("%s waits for the lead", lease.identity)
        winning = asyncio.create_task(election.win())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({winning, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel([stopping])
        if not winning.done():
            await _cancel([winning])
            return True
        await winning
        _log.info("%s leads", lease.identity)
        lost = await self._operate(election)
        if not lost:
            await election.resign()
        return not lost

    async def _operate(self, election: Election | None) -> bool:
        """True when the lead was lost."""
        settings, queue = self._settings, Queue()
        client = JobsClient(settings.endpoint)
        # The two know each other: a changed view is a reason to look at a job.
        reconciler: Reconciler | None = None

        def changed(job: str | None) -> None:
            if reconciler is not None:
                reconciler.controller_changed(job)

        controller = PolledController(
            client, changed, interval_s=settings.poll_interval_s, refused_s=settings.limits.refused_s
        )
        policy = Policy(settings.around, settings.limits, settings.pace)
        reconciler = Reconciler(self._server, controller, queue, policy)
        caches = reconciler.caches
        watches = [
            Watch(self._server, cache, settings.namespace, "" if cache is caches.jobs else names.OURS)
            for cache in (caches.pods, caches.budgets, caches.jobs)
        ]
        tasks = [asyncio.create_task(watch.run()) for watch in watches]
        lead = asyncio.create_task(election.hold()) if election is not None else None
        stopping = asyncio.create_task(self._stopping.wait())
        ends: list[asyncio.Task[Any]] = [stopping, *([lead] if lead is not None else [])]
        try:
            # Nothing is decided before all that is there was seen: what is unknown looks as if it were missing.
            await _first(ends, asyncio.gather(controller.poll(), *(watch.synced.wait() for watch in watches)))
            tasks.append(asyncio.create_task(controller.run()))
            tasks += [asyncio.create_task(reconciler.run()) for _ in range(settings.workers)]
            await asyncio.wait([*ends, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            return lead is not None and lead.done()
        finally:
            await _cancel([*tasks, *ends])
            queue.close()
            client.close()


async def serve_health(host: str, port: int) -> web.AppRunner:
    """/healthz and /readyz: the process answers. An operator that waits for the lead is ready, too."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/healthz", answer)
    app.router.add_get("/readyz", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def stop_on_signals(process: OperatorProcess) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stop)


async def _first(ends: list[asyncio.Task[Any]], work: asyncio.Future[Any]) -> None:
    """Until the work is done or one of the ends has come."""
    await asyncio.wait([*ends, work], return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
