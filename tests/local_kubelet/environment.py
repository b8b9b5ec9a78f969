"""A container's environment and command line, with every reference resolved. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence

from local_kubelet.cluster import Json

_VARIABLE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_KEYED_FIELD = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")

# The data of a Secret or ConfigMap by kind and name, as text; None if it is not there.
Lookup = Callable[[str, str], dict[str, str] | None]


class Unresolved(Exception):
    """Something that the container refers to is not there (kubelet: CreateContainerConfigError)."""


def environment(container: Json, pod: Json, lookup: Lookup) -> dict[str, str]:
    """Of a container of this pod: envFrom, then env, in order. Raises Unresolved."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= _all_of(source, lookup)
    for entry in container.get("env", []):
        if "valueFrom" not in entry:
            found[entry["name"]] = expanded(entry.get("value", ""), found)
        elif (value := _referred(entry["valueFrom"], pod, container, lookup)) is not None:
            found[entry["name"]] = value
    return found


def command_line(container: Json, variables: dict[str, str]) -> list[str]:
    """What the container runs: $(VARIABLE) stands for its value. Raises Unresolved where only the image knows."""
    words = [*container.get("command", []), *container.get("args", [])]
    if "command" not in container:
        raise Unresolved(f"container {container['name']} gives no command, and there is no image here to ask")
    return [expanded(word, variables) for word in words]


def expanded(text: str, variables: dict[str, str]) -> str:
    """$(NAME) becomes its value, if there is one; $$ is a $."""
    return _VARIABLE.sub(lambda match: "$" if match[1] is None else variables.get(match[1], match[0]), text)


def decoded(secret: Json) -> dict[str, str]:
    """A Secret's data as text."""
    return {
        key: base64.b64decode(value).decode(errors="surrogateescape") for key, value in secret.get("data", {}).items()
    }


def field(pod: Json, path: str) -> str:
    """A fieldRef. Raises Unresolved for a path that this kubelet does not know."""
    if match := _KEYED_FIELD.fullmatch(path):
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
    spec, status, metadata = pod["spec"], pod.get("status", {}), pod["metadata"]
    known = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": status.get("podIP", ""),
        "status.hostIP": status.get("hostIP", ""),
    }
    if path not in known:
        raise Unresolved(f"the field {path} is not known; known are {', '.join(known)}")
    return str(known[path])


def _all_of(source: Json, lookup: Lookup) -> dict[str, str]:
    kind, reference = _kind_of(source, ("secretRef", "Secret"), ("configMapRef", "ConfigMap"))
    data = lookup(kind, reference["name"])
    if data is None:
        if reference.get("optional"):
            return {}
        raise Unresolved(f'{kind.lower()} "{reference["name"]}" not found')
    return {source.get("prefix", "") + key: value for key, value in data.items()}


def _referred(source: Json, pod: Json, container: Json, lookup: Lookup) -> str | None:
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        kind, _, name = source["resourceFieldRef"]["resource"].partition(".")
        return str(container.get("resources", {}).get(kind, {}).get(name, "0"))
    kind, reference = _kind_of(source, ("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap"))
    data = lookup(kind, reference["name"])
    if data is not None and reference["key"] in data:
        return data[reference["key"]]
    if reference.get("optional"):
        return None
    what = f'{kind.lower()} "{reference["name"]}" not found'
    raise Unresolved(what if data is None else f"couldn't find key {reference['key']} in {kind} {reference['name']}")


def _kind_of(source: Json, *kinds: tuple[str, str]) -> tuple[str, Json]:
    for name, kind in kinds:
        if name in source:
            return kind, source[name]
    raise Unresolved(f"none of {', '.join(name for name, _ in kinds)} in {source}")


def replaced(words: Sequence[str], places: dict[str, str]) -> list[str]:
    """Words with each mount's path replaced by the local folder that stands for it. places: mount path to folder."""
    return [_one_replaced(word, places) for word in words]


def _one_replaced(word: str, places: dict[str, str]) -> str:
    # The longest first: /data/checkpoints may be mounted inside /data.
    for mount in sorted(places, key=len, reverse=True):
        local = places[mount].replace("\\", r"\\")
        word = re.sub(rf"(?<![\w.-]){re.escape(mount)}(?=$|[/:,;'\"\s])", local, word)
    return word
