"""Which node a pod is bound to, or why none will do. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from local_kubelet.cluster import Json

_QUANTITY = re.compile(r"([0-9.]+)([a-zA-Z]*)")
_BINARY = {f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}
_SUFFIXES = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, **_BINARY}
_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Placement:
    """node: None where the pod cannot be placed; reason then says why, in the scheduler's words."""

    node: str | None
    reason: str = ""


def place(pod: Json, nodes: Sequence[Json], pods: Iterable[Json]) -> Placement:
    """The node with the fewest pods among those that take this one. pods: all that there are, in any state."""
    bound: dict[str, list[Json]] = {node["metadata"]["name"]: [] for node in nodes}
    for other in pods:
        if _holds_its_place(other):
            bound.get(other["spec"]["nodeName"], []).append(other)
    refusals: dict[str, int] = {}
    fitting = []
    for node in nodes:
        name = node["metadata"]["name"]
        refusal = _refusal(pod, node, bound[name])
        if refusal is None:
            fitting.append((len(bound[name]), name))
        else:
            refusals[refusal] = refusals.get(refusal, 0) + 1
    if fitting:
        return Placement(min(fitting)[1])
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(refusals.items()))
    return Placement(None, f"0/{len(nodes)} nodes are available: {reasons or 'there are none'}.")


def requests(pod: Json) -> dict[str, float]:
    """What a pod asks a node for, by resource, in its base unit (cores, bytes, pieces); itself is one of `pods`."""
    spec = pod["spec"]
    running = _added(_container_requests(each) for each in spec["containers"])
    for each in spec.get("initContainers", []):
        for name, amount in _container_requests(each).items():
            running[name] = max(running.get(name, 0.0), amount)
    return {**running, "pods": 1.0}


def amount(quantity: str | int | float) -> float:
    """A Kubernetes quantity (`500m`, `2Gi`, 3) as a number. Raises ValueError."""
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(
            f"{quantity!r} is not a quantity; give a number, or one with a suffix of {', '.join(_SUFFIXES)}"
        )
    return float(match[1]) * _SUFFIXES[match[2]]


def _refusal(pod: Json, node: Json, there: Iterable[Json]) -> str | None:
    spec = node.get("spec", {})
    for taint in spec.get("taints", []):
        if taint["effect"] in ("NoSchedule", "NoExecute") and not _tolerated(pod, taint):
            return f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
    if spec.get("unschedulable"):
        return "node(s) were unschedulable"
    labels = node["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in pod["spec"].get("nodeSelector", {}).items()):
        return "node(s) didn't match Pod's node affinity/selector"
    used = _added(requests(other) for other in there)
    for name, wanted in requests(pod).items():
        free = amount(node["status"]["allocatable"].get(name, 0)) - used.get(name, 0.0)
        if wanted > free + 1e-9:
            return "Too many pods" if name == "pods" else f"Insufficient {name}"
    return None


def _tolerated(pod: Json, taint: Mapping[str, str]) -> bool:
    for toleration in pod["spec"].get("tolerations", []):
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        if toleration.get("operator") == "Exists":
            if toleration.get("key") in (None, "", taint["key"]):
                return True
        elif toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def _holds_its_place(pod: Json) -> bool:
    return bool(pod["spec"].get("nodeName")) and pod.get("status", {}).get("phase") not in _ENDED


def _container_requests(container: Json) -> dict[str, float]:
    resources = container.get("resources", {})
    # A limit without a request is one.
    given = {**resources.get("limits", {}), **resources.get("requests", {})}
    return {name: amount(quantity) for name, quantity in given.items()}


def _added(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in amounts:
        for name, value in each.items():
            total[name] = total.get(name, 0.0) + value
    return total
