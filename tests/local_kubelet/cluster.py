"""The API server that KUBECONFIG names, through `kubectl proxy`: whatever kubectl can log in to, the tests can use."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import httpx

Json = dict[str, Any]

_STRATEGIC = "application/strategic-merge-patch+json"
_MERGE = "application/merge-patch+json"
_WATCH_S = 240


class Refused(Exception):
    """The API server said no. code: the HTTP status; reason: one word, such as NotFound or Conflict."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason


class Proxy:
    """`kubectl proxy` on a free port of loopback, for as long as the block lasts. url: where it serves."""

    def __init__(self, kubectl: str, kubeconfig: str) -> None:
        self._command = [kubectl, "--kubeconfig", kubeconfig, "proxy", "--port=0"]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Proxy:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        # "Starting to serve on 127.0.0.1:40123"
        said = self._process.stdout.readline()
        address = said.rpartition(" ")[2].strip()
        assert address.startswith("127.0.0.1:"), f"kubectl proxy did not start: {said}{self._process.stdout.read()}"
        self.url = f"http://{address}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Cluster:
    """Objects as the API server's JSON, by path (`/api/v1/namespaces/x/pods`). Raises Refused."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=30.0)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> Json:
        return await self._ask("GET", path)

    async def create(self, path: str, body: Json) -> Json:
        return await self._ask("POST", path, body)

    async def merge(self, path: str, patch: Json) -> Json:
        return await self._ask("PATCH", path, patch, content_type=_MERGE)

    async def merge_lists(self, path: str, patch: Json) -> Json:
        """A strategic merge: entries of lists such as conditions and taints are merged by their key."""
        return await self._ask("PATCH", path, patch, content_type=_STRATEGIC)

    async def delete(self, path: str, *, uid: str | None = None, grace_s: int | None = None) -> None:
        """Ask for a deletion; what is gone already is fine. uid: only this very object."""
        options: Json = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            await self._ask("DELETE", path, options)
        except Refused as refusal:
            if refusal.code not in (404, 409):
                raise

    async def watch(self, path: str, version: str) -> AsyncIterator[tuple[str, Json]]:
        """(ADDED | MODIFIED | DELETED, object) from a version on, until the server ends it. 410: it is too old."""
        query = {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(_WATCH_S)}
        # No limit on silence: the server ends it by itself.
        limits = httpx.Timeout(30.0, read=_WATCH_S + 30.0)
        async with self._client.stream("GET", path, params=query, timeout=limits) as answer:
            if answer.status_code != httpx.codes.OK:
                raise _refusal(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                change = json.loads(line)
                if change["type"] == "ERROR":
                    status = change["object"]
                    raise Refused(status.get("code", 500), status.get("reason", ""), status.get("message", ""))
                yield change["type"], change["object"]

    async def _ask(
        self, method: str, path: str, body: Json | None = None, content_type: str = "application/json"
    ) -> Json:
        content = None if body is None else json.dumps(body)
        answer = await self._client.request(method, path, content=content, headers={"Content-Type": content_type})
        if answer.is_error:
            raise _refusal(answer.status_code, answer.content)
        found: Json = answer.json()
        return found


def _refusal(code: int, content: bytes) -> Refused:
    try:
        status = json.loads(content)
        return Refused(code, status.get("reason", ""), status.get("message", ""))
    except (ValueError, AttributeError):
        return Refused(code, "", content.decode(errors="replace")[:500])
