"""Readiness and liveness probes: exec, httpGet, tcpSocket, grpc (as a connection)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from local_kubelet.cluster import Json
from local_kubelet.environment import command_line, replaced


@dataclass(frozen=True, slots=True)
class Place:
    """Where a container's probes look."""

    pod_ip: str
    environment: Mapping[str, str]
    mounts: Mapping[str, str]
    folder: Path
    container: Json


async def passes(probe: Json, place: Place) -> bool:
    """Whether the probe says yes, now."""
    limit_s = float(probe.get("timeoutSeconds", 1))
    try:
        async with asyncio.timeout(limit_s):
            if "exec" in probe:
                return await _runs(probe["exec"]["command"], place)
            if "httpGet" in probe:
                return await _answers(probe["httpGet"], place)
            _, writer = await asyncio.open_connection(
                place.pod_ip, _port((probe.get("tcpSocket") or probe["grpc"])["port"], place)
            )
            writer.close()
            return True
    except (OSError, httpx.HTTPError, TimeoutError):
        return False


async def _runs(command: list[str], place: Place) -> bool:
    words = replaced(command_line({"name": "probe", "command": command}, dict(place.environment)), dict(place.mounts))
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=place.folder,
        env=dict(place.environment),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        return await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


async def _answers(request: Json, place: Place) -> bool:
    scheme = request.get("scheme", "HTTP").lower()
    url = f"{scheme}://{request.get('host', place.pod_ip)}:{_port(request['port'], place)}{request.get('path', '/')}"
    # A kubelet does not check certificates of probes.
    async with httpx.AsyncClient(verify=False) as client:
        answer = await client.get(url)
    return 200 <= answer.status_code < 400


def _port(port: int | str, place: Place) -> int:
    if isinstance(port, int):
        return port
    return next(int(each["containerPort"]) for each in place.container.get("ports", []) if each.get("name") == port)
