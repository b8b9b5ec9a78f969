"""A cluster in memory with a controller, and an operator that can be killed between any two calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etj.memory_server import MemoryServer
from stretto_operator import names
from stretto_operator.diff import Pace
from stretto_operator.limits import Limits
from stretto_operator.queue import Queue
from stretto_operator.reconciler import Policy, Reconciler
from stretto_operator.requests import Create, Delete, Pause, Request, Resume, Scale, SetAutoscale
from stretto_operator.server import JOB, ApiError, Manifest
from stretto_operator.surroundings import Surroundings
from stretto_operator.times import to_text
from stretto_operator.view import ControllerView, JobView, NodeView

START_S = 1_800_000_000.0
AROUND = Surroundings("stretto-controller:29400", issuer_key=bytes(32))


class Crash(BaseException):
    """The operator's process is gone."""


class MemoryController:
    """Knows jobs as a controller does, as far as the operator asks."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobView] = {}
        self.reachable = True
        self.refusal = ""
        self.requests: list[Request] = []

    def view(self, job: str) -> ControllerView:
        reason = "" if self.reachable else "no controller can be reached"
        return ControllerView(self.reachable, reason, self.jobs.get(job), self.refusal)

    async def ask(self, request: Request) -> None:
        self.requests.append(request)
        found = self.jobs.get(request.job)
        match request:
            case Create() if not self.refusal:
                if found is None or found.finished:
                    found = JobView("pending", training=request.training)
                self.jobs[request.job] = replace(found, desired_nodes=request.desired_nodes)
            case Scale() if found is not None:
                self.jobs[request.job] = replace(found, desired_nodes=request.nodes)
            case SetAutoscale() if found is not None:
                self.jobs[request.job] = replace(found, autoscale=request.autoscale)
            case Pause() if found is not None:
                self.jobs[request.job] = replace(found, phase="paused")
            case Resume() if found is not None:
                self.jobs[request.job] = replace(found, phase="pending")
            case Delete():
                self.jobs.pop(request.job, None)
            case _:
                pass


class Site:
    """All parts, and a clock that stands still unless it is told to move."""

    def __init__(self) -> None:
        self.now_s = START_S
        self.server = MemoryServer(lambda: self.now_s)
        self.controller = MemoryController()
        self.limits = Limits()
        self.start_operator()

    def start_operator(self) -> None:
        """A fresh process: it knows nothing but what the API server and the controller say."""
        policy = Policy(AROUND, self.limits, Pace())
        self.reconciler = Reconciler(self.server, self.controller, Queue(), policy, lambda: self.now_s)

    async def see(self) -> None:
        """What watches would have brought by now."""
        caches = self.reconciler.caches
        for cache in (caches.jobs, caches.pods, caches.budgets):
            selector = "" if cache.kind is JOB else names.OURS
            cache.replace((await self.server.list(cache.kind, None, selector)).items)

    async def look(self, name: str = "digits") -> None:
        """One look at one job; what the API server refuses for now is tried again at the next."""
        await self.see()
        try:
            await self.reconciler.reconcile(("default", name))
        except ApiError as error:
            if not (error.passing or error.conflict or error.missing):
                raise

    async def settle(self, name: str = "digits", *, rounds: int = 30) -> None:
        """Look until nothing is written any more. Time passes between the looks, for what waits for it."""
        for _ in range(rounds):
            before = len(self.server.writes), len(self.controller.requests)
            await self.look(name)
            self.now_s += 2.5
            if before == (len(self.server.writes), len(self.controller.requests)):
                return
        raise AssertionError(f"it does not come to rest: {self.server.writes[-8:]}")

    def apply(self, name: str = "digits", **spec: Any) -> None:
        self.server.add(manifest(name, **spec))

    def status(self, name: str = "digits") -> dict[str, Any]:
        status: dict[str, Any] = self.server.all(names.KIND)[name].get("status") or {}
        return status

    def condition(self, kind: str, name: str = "digits") -> dict[str, Any]:
        return next((each for each in self.status(name)["conditions"] if each["type"] == kind), {})

    def pods(self) -> list[str]:
        return list(self.server.all("Pod"))

    def run_pods(self) -> None:
        """The kubelet: what is pending runs, what terminates is gone."""
        for name, pod in self.server.all("Pod").items():
            if pod["metadata"].get("deletionTimestamp"):
                self.server.remove("Pod", name)
            elif not pod.get("status"):
                ready = [{"type": "Ready", "status": "True"}]
                self.server.change("Pod", name, status={"phase": "Running", "conditions": ready})

    def end_pod(self, name: str, code: int = 0, reason: str = "", **status: Any) -> None:
        end = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "startedAt": to_text(self.now_s - 60),
            "finishedAt": to_text(self.now_s),
        }
        container = {"name": "trainer", "state": {"terminated": end}}
        phase = "Succeeded" if code == 0 else "Failed"
        self.server.change(
            "Pod", name, status={"phase": phase, "containerStatuses": [container], "conditions": [], **status}
        )

    def train(self, name: str = "digits", **figures: Any) -> None:
        """The controller says that the job's running pods train."""
        running = [
            pod for pod, each in self.server.all("Pod").items() if (each.get("status") or {}).get("phase") == "Running"
        ]
        job = names.controller_job("default", name)
        nodes = {pod: NodeView("active", rank) for rank, pod in enumerate(running)}
        known = self.controller.jobs[job]
        self.controller.jobs[job] = replace(
            known,
            **{"phase": "running", "generation": known.generation + 1, "scale": 1.0 * len(nodes), **figures},
            nodes=nodes,
        )

    def say(self, name: str = "digits", **changes: Any) -> None:
        """The controller's view becomes this."""
        job = names.controller_job("default", name)
        self.controller.jobs[job] = replace(self.controller.jobs[job], **changes)

    async def begin(self, name: str = "digits", **spec: Any) -> None:
        """A job that trains."""
        self.apply(name, **spec)
        await self.settle(name)
        self.run_pods()
        self.train(name)
        await self.settle(name)


def manifest(name: str = "digits", **spec: Any) -> Manifest:
    """With the defaults that the API server fills in."""
    template: Mapping[str, Any] = {"spec": {"containers": [{"name": "trainer", "image": "worker:1"}]}}
    filled = {"nodes": 1, "minNodes": 1, "maxNodes": 8, "reconfigure": "in-process", "template": template, **spec}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": "default"},
        "spec": filled,
    }
