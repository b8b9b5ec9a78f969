"""What was last seen of one kind of objects, and which jobs a change concerns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from stretto_operator import names
from stretto_operator.server import JOB, Kind, Manifest

Key = tuple[str, str]
# As many objects that are gone are remembered, so that a late answer does not bring one back.
_REMEMBERED = 10_000


class Cache:
    """The objects of one kind, by namespace and name; by job, through their label.

    changed: called with the key of the job that an object belongs to, whenever one comes, changes or goes.
    """

    def __init__(self, kind: Kind, changed: Callable[[Key], None]) -> None:
        self.kind = kind
        self._changed = changed
        self._objects: dict[Key, Manifest] = {}
        self._by_job: dict[Key, dict[Key, Manifest]] = {}
        self._gone: dict[str, None] = {}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._objects)

    def get(self, key: Key) -> Manifest | None:
        return self._objects.get(key)

    def of_job(self, job: Key) -> list[Manifest]:
        return list(self._by_job.get(job, {}).values())

    def replace(self, manifests: Iterable[Manifest]) -> None:
        """A new list: what it lacks is gone."""
        fresh = {_key(manifest): manifest for manifest in manifests}
        for key in [key for key in self._objects if key not in fresh]:
            self.remove(self._objects[key])
        for manifest in fresh.values():
            self.put(manifest)

    def put(self, manifest: Manifest) -> None:
        """From a list, a watch, or the answer to a call of ours: whichever is newest stays."""
        key, metadata = _key(manifest), manifest["metadata"]
        before = self._objects.get(key)
        if metadata["uid"] in self._gone or (before is not None and _version(before) >= _version(manifest)):
            return
        self._objects[key] = manifest
        self._by_job.setdefault(self._job(manifest), {})[key] = manifest
        self._changed(self._job(manifest))

    def remove(self, manifest: Manifest) -> None:
        key, uid = _key(manifest), manifest["metadata"]["uid"]
        self._gone[uid] = None
        while len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]
        before = self._objects.get(key)
        if before is None or before["metadata"]["uid"] != uid:
            return
        job = self._job(before)
        del self._objects[key]
        self._by_job[job].pop(key, None)
        if not self._by_job[job]:
            del self._by_job[job]
        self._changed(job)

    def _job(self, manifest: Manifest) -> Key:
        metadata = manifest["metadata"]
        if self.kind is JOB:
            return _key(manifest)
        return metadata["namespace"], (metadata.get("labels") or {}).get(names.JOB_LABEL, "")


def _key(manifest: Manifest) -> Key:
    metadata = manifest["metadata"]
    return metadata["namespace"], metadata["name"]


def _version(manifest: Manifest) -> int:
    return int(manifest["metadata"]["resourceVersion"])
