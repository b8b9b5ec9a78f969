"""A pod's volumes as folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from local_kubelet.cluster import Json
from local_kubelet.environment import Lookup, Unresolved

_FORBIDDEN = re.compile(r"[^a-zA-Z0-9._-]")


class Volumes:
    """pod_folder: gone with the pod; claims_folder: what claims hold, kept for as long as the kubelet lives."""

    def __init__(self, pod_folder: Path, claims_folder: Path) -> None:
        self._pod_folder = pod_folder
        self._claims_folder = claims_folder

    def prepare(self, pod: Json, lookup: Lookup, service_account_token: str) -> dict[str, Path]:
        """The folder of each volume, filled. Raises Unresolved where it refers to what is not there."""
        folders = {}
        for volume in pod["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                folder = self._claims_folder / pod["metadata"]["namespace"] / claim
            else:
                folder = self._pod_folder / "volumes" / _FORBIDDEN.sub("_", volume["name"])
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in _files(volume, pod, lookup, service_account_token).items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            folders[volume["name"]] = folder
        return folders


def mounts(container: Json, folders: Mapping[str, Path]) -> dict[str, str]:
    """The local folder of each path that the container mounts something at."""
    found = {}
    for mount in container.get("volumeMounts", []):
        folder = folders[mount["name"]] / mount.get("subPath", "")
        if not folder.suffix:
            folder.mkdir(parents=True, exist_ok=True)
        found[mount["mountPath"].rstrip("/")] = str(folder)
    return found


def _files(volume: Json, pod: Json, lookup: Lookup, token: str) -> dict[str, str]:
    if "secret" in volume:
        return _chosen("Secret", volume["secret"]["secretName"], volume["secret"], lookup)
    if "configMap" in volume:
        return _chosen("ConfigMap", volume["configMap"]["name"], volume["configMap"], lookup)
    found: dict[str, str] = {}
    for source in volume.get("projected", {}).get("sources", []):
        if "serviceAccountToken" in source:
            found[source["serviceAccountToken"]["path"]] = token
        elif "configMap" in source:
            found |= _chosen("ConfigMap", source["configMap"]["name"], source["configMap"], lookup)
        elif "secret" in source:
            found |= _chosen("Secret", source["secret"]["name"], source["secret"], lookup)
        elif "downwardAPI" in source:
            found["namespace"] = pod["metadata"]["namespace"]
    return found


def _chosen(kind: str, name: str, source: Json, lookup: Lookup) -> dict[str, str]:
    data = lookup(kind, name)
    if data is None:
        if source.get("optional"):
            return {}
        raise Unresolved(f'{kind.lower()} "{name}" not found')
    if "items" not in source:
        return data
    return {item["path"]: data[item["key"]] for item in source["items"] if item["key"] in data}
