"""One controller process from its start to its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path

from stretto_controller.auth.certificates import Certificates
from stretto_controller.auth.tokens import Tokens
from stretto_controller.garbage import collect_on
from stretto_controller.reviewer import Reviewer
from stretto_controller.runner import Runner, Unavailable
from stretto_controller.service.server import GrpcServer, address
from stretto_controller.settings import Settings, is_wildcard
from stretto_controller.store.choice import open_store
from stretto_controller.store.contents import Leader, Store, StoreError
from stretto_controller.tracing import Tracing
from stretto_controller.web.app import build_app
from stretto_controller.web.server import HttpServer

_log = logging.getLogger("stretto.controller")

# A follower says that it serves after so long without the lead.
_ANNOUNCE_LATEST_S = 1.0
# Between two attempts of a controller that etcd refuses.
_REFUSED_PAUSE_S = 1.0


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, and return 0; 1 when the controller could not save.

    With etcd, a controller that has lost the lead begins anew, as a follower.
    Raises StoreError or OSError, with what to do, when it cannot start.
    """
    stopped = _on_signals()
    collector = asyncio.create_task(collect_on())
    try:
        term = Term(settings)
        code = await term.serve(stopped)
        while code is Outcome.AGAIN:
            term = Term(term.settings, term.runner.store_errors, again=True)
            code = await term.serve(stopped)
    finally:
        await _cancelled(collector)
    _log.info("stopped")
    return 0 if code is Outcome.STOPPED else 1


class Outcome(Enum):
    STOPPED = "stopped"
    FAILED = "failed"
    AGAIN = "again"


class Term:
    """From following to leading to the end of either; nothing of it is used again but the ports."""

    def __init__(self, settings: Settings, store_errors: int = 0, *, again: bool = False) -> None:
        self.settings = settings
        self._store = open_store(settings)
        self.runner = Runner(self._store, settings.service, settings.limits)
        self.runner.store_errors = store_errors
        self._again = again

    async def serve(self, stopped: asyncio.Event) -> Outcome:
        if self.settings.trace_endpoint:
            self.runner.tracing = Tracing.to(self.settings.trace_endpoint)
        try:
            return await self._serve(stopped)
        finally:
            await self._store.close()
            if self.runner.tracing is not None:
                await asyncio.to_thread(self.runner.tracing.close)

    async def _serve(self, stopped: asyncio.Event) -> Outcome:
        settings, runner = self.settings, self.runner
        term: asyncio.Task[None] | None = None
        security = settings.security
        tokens = Tokens(security.tokens, security.reload_interval_s)
        certificates = None
        if security.tls_cert is not None and security.tls_key is not None:
            certificates = Certificates(security.tls_cert, security.tls_key, security.tls_client_ca)
        grpc_server = GrpcServer(runner, settings, tokens, certificates)
        http_server = HttpServer(build_app(runner, settings.service, tokens), settings, certificates)
        try:
            settings = self.settings = replace(
                settings, grpc_port=await grpc_server.start(), http_port=await http_server.start()
            )
            reviewer = Reviewer(runner, settings.service, settings.limits)
            term = asyncio.create_task(
                take_part(self._store, runner, reviewer, lambda: _me(self.settings), again=self._again)
            )
            # Who leads at once, says so only then.
            await asyncio.wait([term], timeout=_ANNOUNCE_LATEST_S)
            if not self._again and not (term.done() and term.exception()):
                _announce(settings)
            await _first_of(stopped, runner.failed, term)
            if runner.failure is None and not stopped.is_set():
                term.result()
        finally:
            await _cancelled(term)
            await runner.stop()
            await grpc_server.stop()
            if runner.failure is not None and settings.store == "sqlite":
                # Long enough for a probe or a scrape to see why.
                await asyncio.sleep(settings.service.failure_shown_s)
            await http_server.stop()
        if runner.failure is None or stopped.is_set():
            return Outcome.STOPPED if runner.failure is None or settings.store == "etcd" else Outcome.FAILED
        return Outcome.AGAIN if settings.store == "etcd" else Outcome.FAILED


async def take_part(store: Store, runner: Runner, reviewer: Reviewer, me: Callable[[], Leader], *, again: bool) -> None:
    """Follow, then lead, until the lead is lost. again: this process has led, or followed, before.

    Raises StoreError at the first start, when a person reads it; later on nobody is there to start it again.
    """
    while True:
        try:
            await store.lead(me())
            break
        except StoreError as error:
            if not again:
                raise
            _log.error("cannot take part: %s", error)
            await asyncio.sleep(_REFUSED_PAUSE_S)
    try:
        runner.start(await store.load())
    except StoreError as error:
        if store.leads() and not again:
            raise
        await asyncio.sleep(_REFUSED_PAUSE_S)
        runner.lose(str(error))
        return
    except Unavailable as error:
        # This process was stopped for longer than its lease while it began.
        runner.lose(str(error))
        return
    if store.leader.grpc_address:
        _log.info("this controller leads")
    reviews = asyncio.create_task(reviewer.review_on())
    try:
        await store.lost.wait()
    finally:
        reviews.cancel()
    runner.lose(store.lost_reason)


def _on_signals() -> asyncio.Event:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped


async def _first_of(first: asyncio.Event, second: asyncio.Event, task: asyncio.Task[None]) -> None:
    waits = [asyncio.create_task(event.wait()) for event in (first, second)]
    try:
        await asyncio.wait([*waits, task], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


def _me(settings: Settings) -> Leader:
    """How others reach this controller."""
    host = settings.host if not is_wildcard(settings.host) else socket.getfqdn()
    grpc_address = settings.advertise or address(host, settings.grpc_port)
    if settings.advertise and ":" not in settings.advertise:
        grpc_address = address(settings.advertise, settings.grpc_port)
    name = grpc_address.rpartition(":")[0]
    return Leader(grpc_address, f"{_scheme(settings)}://{name}:{settings.http_port}")


def _scheme(settings: Settings) -> str:
    return "http" if settings.security.tls_cert is None else "https"


def _announce(settings: Settings) -> None:
    grpc_address = address(settings.host, settings.grpc_port)
    url = f"{_scheme(settings)}://{address(settings.host, settings.http_port)}"
    where = settings.data_dir if settings.store == "sqlite" else f"etcd at {settings.etcd.endpoints}"
    _log.info("serving gRPC on %s, and %s/, %s/metrics; state in %s", grpc_address, url, url, where)
    if settings.ready_file is not None:
        _write_whole(settings.ready_file, json.dumps({"grpc": grpc_address, "http": url, "pid": os.getpid()}))


def _write_whole(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
