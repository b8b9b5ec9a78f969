"""The loop: sees pods, binds them to nodes, runs them, and takes nodes and pods away when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Mapping

import httpx

from local_kubelet.cluster import Cluster, Json, Refused
from local_kubelet.nodes import Nodes
from local_kubelet.pod import Machine, PodRun, disrupted, unschedulable
from local_kubelet.scheduling import place

_RETRY_S = 0.5
_ENDED = ("Succeeded", "Failed")


class Kubelet:
    """Every pod of one namespace. Other namespaces' pods are nobody's here."""

    def __init__(self, machine: Machine, namespace: str) -> None:
        self._machine = machine
        self._cluster: Cluster = machine.cluster
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self.nodes = Nodes(machine.cluster)
        self._pods: dict[str, Json] = {}
        self._runs: dict[str, PodRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Where we have bound them; the watch tells what was before that for a while.
        self._bound: dict[str, str] = {}
        self._scheduling = asyncio.Lock()
        # Two kubelets on one machine shall not give the same addresses.
        network = f"127.{random.randrange(16, 250)}"
        self._addresses = (f"{network}.{number // 250}.{number % 250 + 1}" for number in itertools.count())

    async def run(self) -> None:
        """For ever."""
        renewing = asyncio.create_task(self.nodes.renew())
        try:
            while True:
                with contextlib.suppress(Refused, httpx.HTTPError):
                    await self._follow()
                await asyncio.sleep(_RETRY_S)
        finally:
            renewing.cancel()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _follow(self) -> None:
        """From a list of all pods to the end of one watch."""
        listed = await self._cluster.get(self._path)
        there = {pod["metadata"]["uid"]: pod for pod in listed["items"]}
        for uid in self._pods.keys() - there.keys():
            self._gone(uid)
        self._pods = {}
        for pod in there.values():
            self._see(pod)
        await self.schedule()
        async for kind, pod in self._cluster.watch(self._path, listed["metadata"]["resourceVersion"]):
            if kind == "DELETED":
                self._gone(pod["metadata"]["uid"])
            else:
                self._see(pod)
            await self.schedule()

    def _see(self, pod: Json) -> None:
        uid, node = pod["metadata"]["uid"], pod["spec"].get("nodeName")
        self._pods[uid] = pod
        if not node and uid in self._bound:
            pod["spec"]["nodeName"] = self._bound[uid]
        if node not in self.nodes:
            return
        if uid not in self._runs:
            self._runs[uid] = PodRun(pod, self._machine, next(self._addresses))
            self._tasks[uid] = asyncio.create_task(self._runs[uid].run())
        if "deletionTimestamp" in pod["metadata"]:
            self._runs[uid].delete(pod)

    def _gone(self, uid: str) -> None:
        """Out of the API server: what is left of it ends at once. Its log stays."""
        self._pods.pop(uid, None)
        self._bound.pop(uid, None)
        self._stop(uid)

    def _stop(self, uid: str) -> None:
        task = self._tasks.pop(uid, None)
        if task is not None:
            self._runs[uid].kill()
            task.cancel()

    async def schedule(self) -> None:
        """Bind what can be bound; say of the others why not."""
        async with self._scheduling:
            await self._schedule()

    async def _schedule(self) -> None:
        waiting = [
            pod
            for pod in self._pods.values()
            if not pod["spec"].get("nodeName")
            and "deletionTimestamp" not in pod["metadata"]
            and not pod["spec"].get("schedulingGates")
            and pod.get("status", {}).get("phase") not in _ENDED
        ]
        for pod in sorted(waiting, key=lambda each: (each["metadata"]["creationTimestamp"], each["metadata"]["name"])):
            placement = place(pod, self.nodes.alive, self._pods.values())
            with contextlib.suppress(Refused):
                if placement.node is not None:
                    await self._bind(pod, placement.node)
                elif _said(pod) != placement.reason:
                    path = f"{self._path}/{pod['metadata']['name']}/status"
                    await self._cluster.merge_lists(path, {"status": {"conditions": [unschedulable(placement.reason)]}})

    async def _bind(self, pod: Json, node: str) -> None:
        metadata = {"name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target}
        await self._cluster.create(f"{self._path}/{metadata['name']}/binding", binding)
        self._bound[metadata["uid"]] = node
        self._pods.get(metadata["uid"], pod)["spec"]["nodeName"] = node

    def pod(self, name: str) -> Json:
        """The newest pod of this name. Raises KeyError."""
        found = [pod for pod in self._pods.values() if pod["metadata"]["name"] == name]
        if not found:
            raise KeyError(
                f"there is no pod {name}; there are {sorted(pod['metadata']['name'] for pod in self._pods.values())}"
            )
        return max(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def logs(self) -> Mapping[str, str]:
        """What every pod has said, by name and the beginning of its uid; those that are gone, too."""
        return {f"{run.path.rpartition('/')[2]} {uid[:8]}": run.log() for uid, run in self._runs.items()}

    async def add_node(self, name: str, capacity: Mapping[str, str], labels: Mapping[str, str]) -> None:
        await self.nodes.register(name, capacity, labels)
        await self.schedule()

    async def lose_node(self, name: str) -> list[str]:
        """kill -9 of all that runs there; nothing more is heard of it. Returns its pods' names."""
        there = self._on(name)
        for pod in there:
            self._stop(pod["metadata"]["uid"])
        await self.nodes.lose(name)
        return [pod["metadata"]["name"] for pod in there]

    async def shut_down_node(self, name: str) -> list[str]:
        """A spot machine is called back: its pods get SIGTERM and end as Failed; then the node is gone."""
        there = self._on(name)
        await self.nodes.close_to_pods(name)
        message = "Pod was terminated in response to imminent node shutdown."
        extra = {"phase": "Failed", "reason": "Terminated", "message": message}
        for pod in there:
            condition = disrupted("TerminationByKubelet", message)
            self._runs[pod["metadata"]["uid"]].terminate({**extra, "conditions": [condition]})
        return [pod["metadata"]["name"] for pod in there]

    async def remove_node(self, name: str) -> None:
        """With all that was bound to it, which nobody else would remove for a while."""
        for uid, pod in self._pods.copy().items():
            if pod["spec"].get("nodeName") == name:
                self._stop(uid)
                await self._cluster.delete(f"{self._path}/{pod['metadata']['name']}", uid=uid, grace_s=0)
        await self.nodes.remove(name)

    async def preempt(self, name: str) -> None:
        """As the scheduler does for a pod of higher priority."""
        pod = self.pod(name)
        condition = disrupted("PreemptionByScheduler", "preempting to accommodate a higher priority pod")
        await self._cluster.merge_lists(f"{self._path}/{name}/status", {"status": {"conditions": [condition]}})
        await self._cluster.delete(f"{self._path}/{name}", uid=pod["metadata"]["uid"])

    async def kill_pod(self, name: str, reason: str) -> None:
        """kill -9 of its processes; the pod says why (OOMKilled, say)."""
        self._runs[self.pod(name)["metadata"]["uid"]].kill(reason)

    def _on(self, node: str) -> list[Json]:
        return [
            pod
            for uid, pod in self._pods.items()
            if pod["spec"].get("nodeName") == node and uid in self._tasks and pod["status"].get("phase") not in _ENDED
        ]


def _said(pod: Json) -> str:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message", ""))
    return ""
