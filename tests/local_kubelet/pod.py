"""One pod on its node: from the pull of its image to the end of its deletion."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from local_kubelet import images
from local_kubelet.cluster import Cluster, Json, Refused
from local_kubelet.environment import Unresolved, command_line, decoded, environment, replaced
from local_kubelet.probes import Place, passes
from local_kubelet.processes import ContainerProcess, now
from local_kubelet.statuses import ContainerState, condition, phase, status
from local_kubelet.volumes import Volumes, mounts

_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a pod meets on any node. environment: more variables for every container."""

    cluster: Cluster
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    # A container that cannot be started is tried again after so long.
    retry_s: float = 1.0
    # One that ended is started again after so long, where its pod wants that; twice as long each time.
    restart_s: float = 1.0
    restart_limit_s: float = 30.0


class PodRun:
    """Runs a bound pod. `run` returns when nothing of it is left to do on this node."""

    def __init__(self, pod: Json, machine: Machine, pod_ip: str) -> None:
        self._pod = pod
        self._machine = machine
        self._ip = pod_ip
        self._folder = machine.folder / "pods" / pod["metadata"]["uid"]
        self._states = [
            ContainerState(each["name"], each["image"], waiting="ContainerCreating")
            for each in pod["spec"]["containers"]
        ]
        self._processes: dict[int, ContainerProcess] = {}
        self._kill_reason = ""
        self._started_at = now()
        self._deleted = asyncio.Event()
        self._dirty = asyncio.Event()
        self._ending = False
        self._extra: Json = {}

    @property
    def path(self) -> str:
        metadata = self._pod["metadata"]
        return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"

    def log(self) -> str:
        """What its containers have said."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("*.log")))

    def delete(self, pod: Json) -> None:
        """The API server has been asked to delete it: SIGTERM now, SIGKILL after its grace period."""
        self._pod = pod
        self._deleted.set()

    def kill(self, reason: str = "") -> None:
        """kill -9 of all its processes, now. reason: told instead of Error, such as OOMKilled."""
        self._kill_reason = reason
        for process in self._processes.values():
            process.kill()

    def terminate(self, extra: Json) -> None:
        """SIGTERM by the node itself (it shuts down). extra: merged into the status with which the pod ends."""
        self._extra = extra
        self._ending = True
        for process in self._processes.values():
            process.terminate()

    async def run(self) -> None:
        if self._pod.get("status", {}).get("phase") in _ENDED:
            await self._deleted.wait()
            await self._finalise()
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        writer = asyncio.create_task(self._write_statuses())
        containers = asyncio.gather(*(self._container(index) for index in range(len(self._states))))
        deleted = asyncio.create_task(self._deleted.wait())
        try:
            both: list[asyncio.Future[Any]] = [containers, deleted]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not self._deleted.is_set():
                await self._told_all()
                await deleted
            await self._end(containers)
            await self._told_all()
            await self._finalise()
        finally:
            for task in (writer, containers, deleted):
                task.cancel()
            self.kill()
            await asyncio.gather(writer, containers, deleted, return_exceptions=True)

    async def _end(self, containers: asyncio.Future[list[None]]) -> None:
        self._ending = True
        for process in self._processes.values():
            process.terminate()
        grace_s = float(self._pod["metadata"].get("deletionGracePeriodSeconds") or 0)
        if self._processes:
            await asyncio.wait([containers], timeout=grace_s)
            for process in self._processes.values():
                process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(containers), 5.0)

    async def _finalise(self) -> None:
        await self._machine.cluster.delete(self.path, uid=self._pod["metadata"]["uid"], grace_s=0)
        shutil.rmtree(self._folder / "volumes", ignore_errors=True)

    async def _container(self, index: int) -> None:
        """Start it, and start it again where the pod wants that, until it has ended for good."""
        container, backoff_s = self._pod["spec"]["containers"][index], self._machine.restart_s
        while True:
            process, place = await self._started(index, container)
            self._processes[index] = process
            if self._ending:
                process.terminate()
            self._set(
                index, started_at=process.started_at, waiting="", message="", ready="readinessProbe" not in container
            )
            prober = asyncio.create_task(self._probe(index, container, place, process))
            code = await process.ended()
            prober.cancel()
            reason = self._kill_reason or ("Completed" if code == 0 else "Error")
            self._set(index, exit_code=code, reason=reason, finished_at=now(), ready=False)
            if self._ending or not self._restarts(code):
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._machine.restart_limit_s)
            self._set(
                index,
                exit_code=None,
                started_at="",
                waiting="CrashLoopBackOff",
                restarts=self._states[index].restarts + 1,
            )

    async def _started(self, index: int, container: Json) -> tuple[ContainerProcess, Place]:
        """Its process, as soon as image, references and command allow."""
        while True:
            failure = images.pull_failure(container["image"])
            if failure is not None:
                seen = self._states[index].waiting
                self._set(
                    index, waiting="ImagePullBackOff" if seen == "ErrImagePull" else "ErrImagePull", message=failure
                )
            else:
                try:
                    return await self._process(index, container)
                except Unresolved as error:
                    self._set(index, waiting="CreateContainerConfigError", message=str(error))
                except OSError as error:
                    self._set(index, waiting="RunContainerError", message=str(error))
            await asyncio.sleep(self._machine.retry_s)

    async def _process(self, index: int, container: Json) -> tuple[ContainerProcess, Place]:
        found = {kind: await self._data(kind) for kind in ("Secret", "ConfigMap")}

        def lookup(kind: str, name: str) -> dict[str, str] | None:
            return found[kind].get(name)

        volumes = Volumes(self._folder, self._machine.folder / "claims")
        places = mounts(container, volumes.prepare(self._pod, lookup, await self._service_account_token()))
        pod = {**self._pod, "status": {**self._pod.get("status", {}), "podIP": self._ip, "hostIP": "127.0.0.1"}}
        variables = environment(container, pod, lookup)
        command = replaced(command_line(container, variables), places)
        variables = dict(zip(variables, replaced(list(variables.values()), places), strict=True))
        everything = {**self._base_environment(), **self._machine.environment, **variables}
        metadata = self._pod["metadata"]
        mark = f"{metadata['uid']}/{container['name']}"
        process = ContainerProcess(mark, command, everything, self._folder, self._folder / f"{container['name']}.log")
        return process, Place(self._ip, everything, places, self._folder, container)

    def _base_environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self._folder),
            "TMPDIR": str(self._folder),
            "HOSTNAME": self._pod["metadata"]["name"],
            "LANG": "C.UTF-8",
        }

    async def _data(self, kind: str) -> dict[str, dict[str, str]]:
        namespace = self._pod["metadata"]["namespace"]
        listed = await self._machine.cluster.get(f"/api/v1/namespaces/{namespace}/{kind.lower()}s")
        return {
            item["metadata"]["name"]: decoded(item) if kind == "Secret" else item.get("data", {})
            for item in listed["items"]
        }

    async def _service_account_token(self) -> str:
        """Empty where the pod asks for none."""
        spec = self._pod["spec"]
        asked = any(
            "serviceAccountToken" in source
            for volume in spec.get("volumes", [])
            for source in volume.get("projected", {}).get("sources", [])
        )
        if not asked:
            return ""
        namespace = f"/api/v1/namespaces/{self._pod['metadata']['namespace']}"
        path = f"{namespace}/serviceaccounts/{spec['serviceAccountName']}/token"
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600},
        }
        return str((await self._machine.cluster.create(path, request))["status"]["token"])

    async def _probe(self, index: int, container: Json, place: Place, process: ContainerProcess) -> None:
        """Say whether it is ready; end it when it is found dead."""
        readiness, liveness = container.get("readinessProbe"), container.get("livenessProbe")
        failures = 0
        period_s = min(float((probe or {}).get("periodSeconds", 10)) for probe in (readiness, liveness))
        await asyncio.sleep(float((liveness or {}).get("initialDelaySeconds", 0)))
        while readiness or liveness:
            if readiness:
                self._set(index, ready=await passes(readiness, place))
            if liveness:
                failures = 0 if await passes(liveness, place) else failures + 1
                if failures >= int(liveness.get("failureThreshold", 3)):
                    process.terminate()
            # Sooner than it says while it is not ready: tests wait for it.
            await asyncio.sleep(period_s if self._states[index].ready else min(period_s, 0.5))

    def _restarts(self, code: int) -> bool:
        policy = self._pod["spec"].get("restartPolicy", "Always")
        return policy == "Always" or (policy == "OnFailure" and code != 0)

    def _set(self, index: int, **changes: object) -> None:
        state = replace(self._states[index], **changes)  # type: ignore[arg-type]  # names and types are ContainerState's
        if state != self._states[index]:
            self._states[index] = state
            self._dirty.set()

    def _status(self) -> Json:
        restarts = not self._ending and self._pod["spec"].get("restartPolicy", "Always") != "Never"
        told = status(
            self._states,
            node_ip="127.0.0.1",
            pod_ip=self._ip,
            started_at=self._started_at,
            now=now(),
            restarts=restarts,
        )
        if self._extra and phase(self._states, restarts=restarts) in _ENDED:
            told |= {key: value for key, value in self._extra.items() if key != "conditions"}
            told["conditions"] += self._extra.get("conditions", [])
        return told

    async def _write_statuses(self) -> None:
        """Tell the API server what is new, the newest only."""
        self._dirty.set()
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._tell()

    async def _told_all(self) -> None:
        await self._tell()
        self._dirty.clear()

    async def _tell(self) -> None:
        body = {"metadata": {"uid": self._pod["metadata"]["uid"]}, "status": self._status()}
        try:
            await self._machine.cluster.merge_lists(f"{self.path}/status", body)
        except Refused as refusal:
            # Gone meanwhile, or another pod has its name by now.
            if refusal.code not in (404, 409):
                raise
        except httpx.HTTPError:
            await asyncio.sleep(self._machine.retry_s)
            self._dirty.set()


def unschedulable(reason: str) -> Json:
    """The condition of a pod that no node takes."""
    return condition("PodScheduled", False, now(), "Unschedulable", reason)


def disrupted(reason: str, message: str) -> Json:
    """The condition of a pod that is taken away by the cluster rather than by its own fault."""
    return condition("DisruptionTarget", True, now(), reason, message)
