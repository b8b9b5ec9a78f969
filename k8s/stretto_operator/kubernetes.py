"""`Server` over HTTP: kubernetes_asyncio knows where the cluster is and who we are; objects stay plain JSON.

Its typed models would be built for every pod of every list, only to be taken apart again.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from kubernetes_asyncio import config
from kubernetes_asyncio.client import ApiClient, Configuration

from stretto_operator import names
from stretto_operator.server import ApiError, Change, Kind, Listing, Manifest

_PAGE = 500
_CALL_TIMEOUT_S = 30.0
# The server ends a watch after this; a connection that says nothing for longer is dead.
_WATCH_S = 240
_JSON = "application/json"


async def load_configuration() -> Configuration:
    """In a pod that pod's service account, elsewhere KUBECONFIG. Raises ConfigException where there is neither."""
    configuration = Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # theirs
    else:
        await config.load_kube_config(client_configuration=configuration)
    return configuration


class Kubernetes:
    """A cluster's API server. Use inside a running event loop; close at the end."""

    def __init__(self, configuration: Configuration) -> None:
        self._client = ApiClient(configuration)
        self._client.user_agent = names.FIELD_MANAGER
        self._host = str(configuration.host).rstrip("/")

    async def close(self) -> None:
        await self._client.close()

    async def list(self, kind: Kind, namespace: str | None, selector: str) -> Listing:
        items: list[Manifest] = []
        query = {"limit": str(_PAGE), **({"labelSelector": selector} if selector else {})}
        while True:
            page = await self._call("GET", _path(kind, namespace), query)
            # Items of a list do not say what they are.
            items += [{**item, "kind": kind.kind, "apiVersion": kind.api_version} for item in page["items"]]
            metadata = page["metadata"]
            if not metadata.get("continue"):
                return Listing(items, metadata["resourceVersion"])
            query["continue"] = metadata["continue"]

    async def watch(
        self, kind: Kind, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncIterator[Change]:
        query = {
            "watch": "1",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_S),
            **({"labelSelector": selector} if selector else {}),
        }
        timeout = aiohttp.ClientTimeout(sock_connect=_CALL_TIMEOUT_S, total=_WATCH_S + _CALL_TIMEOUT_S)
        response = await self._send("GET", _path(kind, namespace), query, timeout=timeout)
        try:
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _error(int(event["object"].get("code", 0)), event["object"], 0.0)
                yield Change(event["type"], event["object"])
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(0, "WatchBroke", f"the watch of {kind.plural} broke: {error}") from error
        finally:
            response.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        return await self._call("GET", _path(kind, namespace, name))

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._call("POST", _path(kind, manifest["metadata"]["namespace"]), query, body=manifest)

    async def update(self, kind: Kind, manifest: Manifest) -> Manifest:
        metadata = manifest["metadata"]
        return await self._call("PUT", _path(kind, metadata["namespace"], metadata["name"]), body=manifest)

    async def merge_status(self, kind: Kind, namespace: str, name: str, patch: Manifest) -> Manifest:
        path = f"{_path(kind, namespace, name)}/status"
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._call("PATCH", path, query, body=patch, content_type="application/merge-patch+json")

    async def json_patch(self, kind: Kind, namespace: str, name: str, patch: Sequence[Manifest]) -> Manifest:
        path, query = _path(kind, namespace, name), {"fieldManager": names.FIELD_MANAGER}
        return await self._call("PATCH", path, query, body=list(patch), content_type="application/json-patch+json")

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str, force: bool = False) -> Manifest:
        options: dict[str, Any] = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if force:
            options["gracePeriodSeconds"] = 0
        return await self._call("DELETE", _path(kind, namespace, name), body=options)

    async def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        *,
        body: Any = None,
        content_type: str = _JSON,
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
        response = await self._send(method, path, query, body=body, content_type=content_type, timeout=timeout)
        try:
            answer: dict[str, Any] = json.loads(await response.read())
            return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(0, "NoAnswer", f"the answer to {method} {path} broke off: {error}") from error
        finally:
            response.release()

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None,
        *,
        timeout: aiohttp.ClientTimeout,
        body: Any = None,
        content_type: str = _JSON,
    ) -> aiohttp.ClientResponse:
        """The answer, its body unread. Raises ApiError for all that is no success."""
        headers = {"Accept": _JSON, "Content-Type": content_type, "User-Agent": names.FIELD_MANAGER}
        parameters = list((query or {}).items())
        await self._client.update_params_for_auth(headers, parameters, ["BearerToken"])
        try:
            response: aiohttp.ClientResponse = await self._client.rest_client.request(
                method,
                self._host + path,
                query_params=dict(parameters),
                headers=headers,
                body=body,
                _preload_content=False,
                _request_timeout=timeout,
            )
            if response.status < 300:
                return response
            text = await response.text()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            why = str(error) or type(error).__name__
            raise ApiError(0, "NoAnswer", f"the API server did not answer {method} {path}: {why}") from error
        try:
            said = json.loads(text)
        except ValueError:
            said = {"message": text[:500]}
        raise _error(response.status, said, _retry_after_s(response.headers.get("Retry-After", "")))


def _path(kind: Kind, namespace: str | None, name: str = "") -> str:
    middle = f"/namespaces/{namespace}" if namespace else ""
    return f"{kind.api}{middle}/{kind.plural}" + (f"/{name}" if name else "")


def _error(status: int, said: Any, retry_after_s: float) -> ApiError:
    said = said if isinstance(said, dict) else {}
    return ApiError(status, str(said.get("reason", "")), str(said.get("message", "")), retry_after_s)


def _retry_after_s(text: str) -> float:
    return float(text) if text.isdecimal() else 0.0
