"""An API server in memory: versions, uids, preconditions, graceful deletion, garbage collection, watches, faults."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stretto_operator.server import POD, ApiError, Change, Kind, Listing, Manifest
from stretto_operator.times import to_text

Fault = Callable[["Call"], None]


@dataclass(frozen=True)
class Call:
    """One request. verb: as RBAC names it."""

    verb: str
    kind: Kind
    name: str = ""
    subresource: str = ""

    @property
    def writes(self) -> bool:
        return self.verb not in ("get", "list", "watch")


class MemoryServer:
    """before, after: called around each call, and may raise. What raises in `after` has happened all the same."""

    def __init__(self, wall_s: Callable[[], float]) -> None:
        self.calls: list[Call] = []
        self.before: Fault = lambda call: None
        self.after: Fault = lambda call: None
        self._wall_s = wall_s
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._watchers: list[tuple[str, asyncio.Queue[Change]]] = []

    @property
    def writes(self) -> list[Call]:
        return [call for call in self.calls if call.writes]

    # The world: users, kubelets, the garbage collector.

    def add(self, manifest: Manifest) -> dict[str, Any]:
        """As a user or another program creates it."""
        made = copy.deepcopy(dict(manifest))
        metadata = made["metadata"] = dict(made["metadata"])
        metadata.setdefault("namespace", "default")
        if "generateName" in metadata:
            metadata["name"] = f"{metadata['generateName']}{next(self._uids)}"
        key = (made["kind"], metadata["namespace"], metadata["name"])
        if key in self._objects:
            raise ApiError(409, "AlreadyExists", f"{made['kind']} {metadata['name']} already exists")
        metadata |= {"uid": f"uid-{next(self._uids)}", "creationTimestamp": to_text(self._wall_s()), "generation": 1}
        return copy.deepcopy(self._store(made, "ADDED"))

    def change(self, kind: str, name: str, namespace: str = "default", **parts: Any) -> None:
        """Set parts of an object, such as its status; spec= counts as a new generation."""
        found = self._objects[kind, namespace, name]
        made = copy.deepcopy(found)
        for part, value in parts.items():
            made[part] = {**made.get(part, {}), **value}
        if "spec" in parts:
            made["metadata"]["generation"] += 1
        self._store(made, "MODIFIED")

    def remove(self, kind: str, name: str, namespace: str = "default") -> None:
        """At once, with everything that belongs to it."""
        gone = self._objects.pop((kind, namespace, name))
        self._tell("DELETED", gone)
        for key, other in list(self._objects.items()):
            owners = other["metadata"].get("ownerReferences") or ()
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.remove(key[0], key[2], key[1])

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        return {name: copy.deepcopy(each) for (k, _, name), each in sorted(self._objects.items()) if k == kind}

    # The API.

    async def list(self, kind: Kind, namespace: str | None, selector: str) -> Listing:
        self._enter(Call("list", kind))
        found = [
            copy.deepcopy(each)
            for (k, ns, _), each in sorted(self._objects.items())
            if k == kind.kind and namespace in (None, ns) and _fits(each, selector)
        ]
        return Listing(found, str(next(self._versions)))

    async def watch(
        self, kind: Kind, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncIterator[Change]:
        self._enter(Call("watch", kind))
        changes: asyncio.Queue[Change] = asyncio.Queue()
        self._watchers.append((kind.kind, changes))
        try:
            while True:
                change = await changes.get()
                if namespace in (None, change.manifest["metadata"]["namespace"]) and _fits(change.manifest, selector):
                    yield change
        finally:
            self._watchers = [each for each in self._watchers if each[1] is not changes]

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        self._enter(Call("get", kind, name))
        return copy.deepcopy(self._find(kind, namespace, name))

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        call = self._enter(Call("create", kind, manifest["metadata"].get("name", "")))
        made = self.add(manifest)
        self.after(call)
        return made

    async def update(self, kind: Kind, manifest: Manifest) -> Manifest:
        metadata = manifest["metadata"]
        call = self._enter(Call("update", kind, metadata["name"]))
        found = self._find(kind, metadata["namespace"], metadata["name"])
        _check(found, metadata)
        made = copy.deepcopy({**found, **manifest, "metadata": {**found["metadata"], **metadata}})
        self._store(made, "MODIFIED")
        self.after(call)
        return copy.deepcopy(made)

    async def merge_status(self, kind: Kind, namespace: str, name: str, patch: Manifest) -> Manifest:
        call = self._enter(Call("patch", kind, name, "status"))
        found = self._find(kind, namespace, name)
        _check(found, patch["metadata"])
        status = {**(found.get("status") or {}), **patch["status"]}
        made = {**found, "status": {key: value for key, value in status.items() if value is not None}}
        self._store(made, "MODIFIED")
        self.after(call)
        return copy.deepcopy(made)

    async def json_patch(self, kind: Kind, namespace: str, name: str, patch: Sequence[Manifest]) -> Manifest:
        call = self._enter(Call("patch", kind, name))
        made = copy.deepcopy(self._find(kind, namespace, name))
        for step in patch:
            *path, last = step["path"].strip("/").split("/")
            place: Any = made
            for part in path:
                place = place[int(part)] if isinstance(place, list) and int(part) < len(place) else place.get(part, {})
            if step["op"] == "test" and place.get(last) != step["value"]:
                raise ApiError(422, "Invalid", f"testing value {step['path']} failed")
            if step["op"] == "replace":
                place[last] = copy.deepcopy(step["value"])
        self._store(made, "MODIFIED")
        self.after(call)
        return copy.deepcopy(made)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str, force: bool = False) -> Manifest:
        call = self._enter(Call("delete", kind, name))
        found = self._find(kind, namespace, name)
        if found["metadata"]["uid"] != uid:
            raise ApiError(409, "Conflict", f"the uid is {found['metadata']['uid']}, not {uid}")
        running = kind is POD and (found.get("status") or {}).get("phase") == "Running"
        if running and not force:
            made = copy.deepcopy(found)
            grace_s = made["spec"].get("terminationGracePeriodSeconds", 30)
            made["metadata"].setdefault("deletionTimestamp", to_text(self._wall_s() + grace_s))
            self._store(made, "MODIFIED")
            found = made
        else:
            self.remove(kind.kind, name, namespace)
        self.after(call)
        return copy.deepcopy(found)

    def _enter(self, call: Call) -> Call:
        self.calls.append(call)
        self.before(call)
        return call

    def _find(self, kind: Kind, namespace: str, name: str) -> dict[str, Any]:
        if (kind.kind, namespace, name) not in self._objects:
            raise ApiError(404, "NotFound", f"{kind.plural} {name} not found")
        return self._objects[kind.kind, namespace, name]

    def _store(self, made: dict[str, Any], change: str) -> dict[str, Any]:
        metadata = made["metadata"]
        metadata["resourceVersion"] = str(next(self._versions))
        self._objects[made["kind"], metadata["namespace"], metadata["name"]] = made
        self._tell(change, made)
        return made

    def _tell(self, change: str, manifest: Manifest) -> None:
        told = copy.deepcopy(dict(manifest))
        if change == "DELETED":
            told["metadata"]["resourceVersion"] = str(next(self._versions))
        for kind, changes in self._watchers:
            if kind == manifest["kind"]:
                changes.put_nowait(Change(change, told))


def _check(found: Manifest, wanted: Manifest) -> None:
    for name in ("uid", "resourceVersion"):
        if name in wanted and wanted[name] != found["metadata"][name]:
            raise ApiError(409, "Conflict", f"the object has been modified: {name}")


def _fits(manifest: Manifest, selector: str) -> bool:
    labels = manifest["metadata"].get("labels") or {}
    key, _, value = selector.partition("=")
    return not selector or labels.get(key) == value
