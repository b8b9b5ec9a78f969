"""One controller process from its start to its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path

from stretto_controller.runner import Runner
from stretto_controller.service.server import GrpcServer, address
from stretto_controller.settings import Settings
from stretto_controller.store.contents import Store
from stretto_controller.store.sqlite import SqliteStore
from stretto_controller.web.app import build_app
from stretto_controller.web.server import HttpServer

_log = logging.getLogger("stretto.controller")


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, and return 0; 1 when the controller could not save.

    Raises StoreError or OSError, with what to do, when it cannot start.
    """
    service = settings.service
    store: Store = SqliteStore(
        settings.data_dir, kept_events=service.kept_events, kept_generations=service.kept_generations
    )
    runner = Runner(store, service, settings.limits)
    try:
        runner.start()
        stopped = _on_signals()
        grpc_server = GrpcServer(runner, settings)
        http_server = HttpServer(build_app(runner, service), settings)
        try:
            grpc_port = await grpc_server.start()
            http_port = await http_server.start()
            _announce(settings, grpc_port, http_port)
            await _first_of(stopped, runner.failed)
        finally:
            await runner.stop()
            await grpc_server.stop()
            if runner.failure is not None:
                # Long enough for a probe or a scrape to see why.
                await asyncio.sleep(service.failure_shown_s)
            await http_server.stop()
    finally:
        await store.close()
    _log.info("stopped")
    return 0 if runner.failure is None else 1


def _on_signals() -> asyncio.Event:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _announce(settings: Settings, grpc_port: int, http_port: int) -> None:
    grpc_address = address(settings.host, grpc_port)
    url = f"http://{address(settings.host, http_port)}"
    _log.info("serving gRPC on %s, and %s/, %s/metrics; state in %s", grpc_address, url, url, settings.data_dir)
    if settings.ready_file is not None:
        _write_whole(settings.ready_file, json.dumps({"grpc": grpc_address, "http": url, "pid": os.getpid()}))


def _write_whole(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
