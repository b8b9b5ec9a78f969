"""Nodes that exist only in the API server: registered, kept alive by their leases, tainted, and taken away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime

from local_kubelet.cluster import Cluster, Json, Refused
from local_kubelet.processes import now

DEFAULT_CAPACITY = {"cpu": "8", "memory": "32Gi", "pods": "10"}
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_RENEW_S = 3.0
_UNREACHABLE = "node.kubernetes.io/unreachable"
# Whoever sets it says that the machine is off: its pods are evicted, and removed without waiting for their kubelet.
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


class Nodes:
    """By name, as the API server's JSON."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._nodes: dict[str, Json] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    @property
    def alive(self) -> list[Json]:
        return list(self._nodes.values())

    async def register(self, name: str, capacity: Mapping[str, str], labels: Mapping[str, str]) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
        await self._cluster.create("/api/v1/nodes", node)
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name},
            "spec": _renewed(name),
        }
        await self._cluster.create(_LEASES, lease)
        await self._revive(name, capacity)

    async def _revive(self, name: str, capacity: Mapping[str, str]) -> None:
        everything = {**DEFAULT_CAPACITY, **capacity}
        status = {
            "capacity": everything,
            "allocatable": everything,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}],
            "conditions": [_ready("True", "KubeletReady")],
        }
        await self._cluster.merge_lists(f"/api/v1/nodes/{name}/status", {"status": status})
        # A node begins with a taint that the node controller takes away; where none runs, nobody else would.
        found = await self._cluster.merge(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        self._nodes[name] = {**found, "spec": {**found["spec"], "taints": []}}

    async def renew(self) -> None:
        """Renew all leases, for ever: a node that stops doing so is lost."""
        while True:
            await asyncio.sleep(_RENEW_S)
            for name in [*self._nodes]:
                try:
                    await self._cluster.merge(f"{_LEASES}/{name}", {"spec": _renewed(name)})
                except (Refused, OSError):
                    continue

    async def lose(self, name: str) -> None:
        """Its machine is off: no more leases, and the taints that follow."""
        self._nodes.pop(name)
        status = {"status": {"conditions": [_ready("Unknown", "NodeStatusUnknown")]}}
        await self._cluster.merge_lists(f"/api/v1/nodes/{name}/status", status)
        taints = [
            {"key": _UNREACHABLE, "effect": "NoSchedule"},
            {"key": _UNREACHABLE, "effect": "NoExecute", "timeAdded": now()},
            {"key": _OUT_OF_SERVICE, "value": "nodeshutdown", "effect": "NoExecute", "timeAdded": now()},
        ]
        await self._cluster.merge(f"/api/v1/nodes/{name}", {"spec": {"taints": taints}})

    async def close_to_pods(self, name: str) -> None:
        """Cordon it."""
        await self._cluster.merge(f"/api/v1/nodes/{name}", {"spec": {"unschedulable": True}})
        self._nodes[name]["spec"]["unschedulable"] = True

    async def remove(self, name: str) -> None:
        """Nothing of it stays in the API server."""
        self._nodes.pop(name, None)
        await self._cluster.delete(f"/api/v1/nodes/{name}")
        await self._cluster.delete(f"{_LEASES}/{name}")


def _renewed(name: str) -> Json:
    moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": moment}


def _ready(state: str, reason: str) -> Json:
    return {"type": "Ready", "status": state, "reason": reason, "lastHeartbeatTime": now(), "lastTransitionTime": now()}
