"""What the operator costs a cluster: 200 jobs of 5 pods, made, then run, then left alone.

    KUBECONFIG=... .venv/bin/python benchmarks/kubernetes_jobs.py [--jobs 200] [--nodes 5] [--idle-s 30]

A real API server, a real controller and a real operator, each in a process of its own; the kubelets are played here:
a pod is said to run as soon as it is there. k8s/crd must be applied; the namespace is made for this, and deleted.
Prints one JSON object. Limits: all reconciled within 30 s on 2 cores, fewer than 3 writes per pod, none when idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness.controller import ControllerProcess
from stretto_operator import names
from stretto_operator.kubernetes import Kubernetes, load_configuration
from stretto_operator.operator_process import OperatorProcess, stop_on_signals
from stretto_operator.server import JOB, POD, Kind, Manifest
from stretto_operator.settings import Settings, surroundings

_NAMESPACE = Kind("Namespace", "namespaces", "/api/v1")
_LIMIT_S = 280.0
_AT_A_TIME = 16


class Counting(Kubernetes):
    """Counts the calls that write, and writes the counts to a file after each."""

    def __init__(self, configuration: Any, file: Path) -> None:
        super().__init__(configuration)
        self._counts: Counter[str] = Counter()
        self._file = file

    async def _send(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        if method != "GET":
            parts = path.split("/")
            what = next(
                each for each in parts if each in ("pods", "elastictrainingjobs", "secrets", "events", "leases")
            )
            self._counts[f"{method} {what}{'/status' if parts[-1] == 'status' else ''}"] += 1
            self._file.write_text(json.dumps(self._counts))
        return await super()._send(method, path, *arguments, **options)


async def operate(namespace: str, endpoint: str, counts: Path) -> None:
    """The operator's process."""
    server = Counting(await load_configuration(), counts)
    process = OperatorProcess(server, Settings(endpoint, surroundings(endpoint, None, {}), namespace))
    stop_on_signals(process)
    await process.run()
    await server.close()


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def job(namespace: str, number: int, nodes: int) -> Manifest:
    containers = [{"name": "trainer", "image": "worker:1", "command": ["stretto", "run", "train.py"]}]
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": f"job-{number:03}", "namespace": namespace},
        "spec": {
            "nodes": nodes,
            "maxNodes": 8,
            "reconfigure": "in-process",
            "template": {"spec": {"containers": containers}},
        },
    }


class Load:
    """The users and the kubelets of one namespace."""

    def __init__(self, server: Kubernetes, namespace: str, jobs: int, nodes: int) -> None:
        self._server = server
        self._namespace = namespace
        self._jobs = jobs
        self._nodes = nodes
        self._running: set[str] = set()

    async def apply(self) -> None:
        await self._all(self._server.create(JOB, job(self._namespace, n, self._nodes)) for n in range(self._jobs))

    async def until_ready(self, began_s: float) -> tuple[float, float]:
        """Plays the kubelets. Seconds until all pods are there, and until all jobs say that all are ready."""
        made_s = 0.0
        while time.monotonic() - began_s < _LIMIT_S:
            pods = (await self._server.list(POD, self._namespace, "")).items
            if len(pods) == self._jobs * self._nodes and not made_s:
                made_s = time.monotonic() - began_s
            fresh = [each["metadata"]["name"] for each in pods if each["metadata"]["name"] not in self._running]
            await self._all(self._run(name) for name in fresh)
            self._running.update(fresh)
            jobs = (await self._server.list(JOB, self._namespace, "")).items
            if sum((each.get("status") or {}).get("readyNodes", 0) == self._nodes for each in jobs) == self._jobs:
                return made_s, time.monotonic() - began_s
            await asyncio.sleep(0.2)
        raise SystemExit(f"only {len(self._running)} pods after {_LIMIT_S} s")

    async def _run(self, pod: str) -> None:
        ready = [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]
        patch = {"metadata": {}, "status": {"phase": "Running", "conditions": ready}}
        await self._server.merge_status(POD, self._namespace, pod, patch)

    async def _all(self, calls: Any) -> None:
        gate = asyncio.Semaphore(_AT_A_TIME)

        async def one(call: Any) -> None:
            async with gate:
                await call

        await asyncio.gather(*(one(call) for call in calls))


async def measure(jobs: int, nodes: int, idle_s: float, directory: Path) -> dict[str, Any]:
    server = Kubernetes(await load_configuration())
    namespace, counts = f"bench-{os.getpid()}", directory / "counts"
    made = await server.create(_NAMESPACE, {"kind": "Namespace", "metadata": {"name": namespace, "namespace": ""}})
    with ControllerProcess(directory) as controller:
        command = [sys.executable, __file__, "--operate", namespace, controller.grpc, str(counts)]
        process = subprocess.Popen(command)
        try:
            load = Load(server, namespace, jobs, nodes)
            await asyncio.sleep(3)
            began_s = time.monotonic()
            await load.apply()
            made_s, ready_s = await load.until_ready(began_s)
            used_s = cpu_s(process.pid)
            # What was held back is written within the pace.
            await asyncio.sleep(5)
            before = json.loads(counts.read_text())
            await asyncio.sleep(idle_s)
            after = json.loads(counts.read_text())
        finally:
            process.terminate()
            process.wait(30)
            await server.delete(_NAMESPACE, "", namespace, uid=made["metadata"]["uid"])
            await server.close()
    writes = {what: count for what, count in before.items() if "leases" not in what}
    return {
        "jobs": jobs,
        "pods": jobs * nodes,
        "all_pods_made_s": round(made_s, 1),
        "all_reconciled_s": round(ready_s, 1),
        "operator_cpu_s": round(used_s, 1),
        "writes": writes,
        "writes_per_pod": round(sum(writes.values()) / (jobs * nodes), 2),
        "idle_writes": sum(count - before.get(what, 0) for what, count in after.items() if "leases" not in what),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--idle-s", type=float, default=30.0)
    parser.add_argument("--operate", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.operate:
        namespace, endpoint, counts = options.operate
        asyncio.run(operate(namespace, endpoint, Path(counts)))
        return
    if "KUBECONFIG" not in os.environ:
        print("kubernetes_jobs.py: KUBECONFIG is not set, so nothing was measured", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(asyncio.run(measure(options.jobs, options.nodes, options.idle_s, Path(directory))), indent=2))


if __name__ == "__main__":
    main()
