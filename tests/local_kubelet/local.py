"""The kubelet beside a test: a loop in a thread of its own, and what a test may do to nodes and pods."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from local_kubelet.cluster import Cluster, Json
from local_kubelet.kubelet import Kubelet
from local_kubelet.pod import Machine

_LIMIT_S = 60.0
T = TypeVar("T")


class LocalKubelet:
    """Runs the pods of one namespace for as long as the block lasts; then its nodes and its processes are gone.

    url: of the API server, without credentials (`cluster.Proxy`). folder: for logs, volumes and claims.
    environment: more variables for every container.
    """

    def __init__(self, url: str, namespace: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._url = url
        self._namespace = namespace
        self._folder = folder
        self._environment = dict(environment or {})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-kubelet", daemon=True)
        self._nodes: list[str] = []

    def __enter__(self) -> LocalKubelet:
        self._thread.start()
        self._call(self._begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LIMIT_S)

    async def _begin(self) -> None:
        self._cluster = Cluster(self._url)
        self._kubelet = Kubelet(Machine(self._cluster, self._folder, self._environment), self._namespace)
        self._running = asyncio.create_task(self._kubelet.run())

    async def _close(self) -> None:
        for name in self._nodes:
            await self._kubelet.remove_node(name)
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._cluster.close()

    def add_node(self, name: str, labels: Mapping[str, str] | None = None, **capacity: str) -> str:
        """A node of this name, made unique by the namespace; capacity: cpu="4", pods="1". Returns its whole name."""
        whole = f"{self._namespace}-{name}"
        self._nodes.append(whole)
        self._call(self._kubelet.add_node(whole, capacity, labels or {}))
        return whole

    def lose_node(self, name: str) -> list[str]:
        """Its machine is off at once: kill -9, NotReady. Returns the names of the pods that ran there."""
        return self._call(self._kubelet.lose_node(name))

    def shut_down_node(self, name: str) -> list[str]:
        """A spot machine is called back: SIGTERM to all that runs there, and no new pods."""
        return self._call(self._kubelet.shut_down_node(name))

    def remove_node(self, name: str) -> None:
        """Its Node object is gone, and with it what still ran there."""
        self._call(self._kubelet.remove_node(name))

    def preempt(self, pod: str) -> None:
        """As the scheduler does for a pod of higher priority."""
        self._call(self._kubelet.preempt(pod))

    def kill_pod(self, pod: str, reason: str = "OOMKilled") -> None:
        """kill -9 of its processes; the pod fails for this reason."""
        self._call(self._kubelet.kill_pod(pod, reason))

    def logs(self) -> Mapping[str, str]:
        return self._call(self._logs())

    def node_of(self, pod: str) -> str:
        """The node that a pod is bound to; empty where it waits."""
        return str(self._call(self._pod(pod))["spec"].get("nodeName", ""))

    async def _logs(self) -> Mapping[str, str]:
        return self._kubelet.logs()

    async def _pod(self, name: str) -> Json:
        return self._kubelet.pod(name)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_LIMIT_S)
