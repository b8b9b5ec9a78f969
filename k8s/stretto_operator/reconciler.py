"""The acting shell: looks at one job after the other, and does what `desired` and `diff` say."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stretto_operator import names
from stretto_operator.cache import Cache, Key
from stretto_operator.controller import Controller
from stretto_operator.desired import wanted
from stretto_operator.diff import (
    Action,
    Announce,
    Create,
    Delete,
    DeleteJob,
    Keep,
    Pace,
    Restore,
    WriteStatus,
    actions,
    restoring,
)
from stretto_operator.job import Job, read_job
from stretto_operator.limits import Limits
from stretto_operator.pod import is_owned, read_pods
from stretto_operator.queue import Queue
from stretto_operator.requests import Delete as Forget
from stretto_operator.server import BUDGET, EVENT, JOB, KINDS, POD, SECRET, ApiError, Manifest, Server
from stretto_operator.surroundings import Surroundings
from stretto_operator.times import to_text

_log = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 60.0
# How long the record of a job that was deleted waits for its nodes to leave the controller.
_FAREWELL_LIMIT_S = 600.0
_FAREWELL_LOOK_S = 2.0


@dataclass
class _Memory:
    """What makes this process polite, and nothing that a decision rests on: it is lost with the process."""

    failures: int = 0
    written_s: float = 0.0
    objection: str = ""
    objections: int = 0


@dataclass
class Caches:
    """What was last seen, all of it reported to one queue."""

    changed: Callable[[Key], None]
    jobs: Cache = field(init=False)
    pods: Cache = field(init=False)
    budgets: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.jobs, self.pods, self.budgets = (Cache(kind, self.changed) for kind in (JOB, POD, BUDGET))


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for all jobs."""

    around: Surroundings
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)


class Reconciler:
    """Level-triggered: every look starts from the caches and the controller's view, whatever came before."""

    def __init__(
        self,
        server: Server,
        controller: Controller,
        queue: Queue,
        policy: Policy,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._server = server
        self._controller = controller
        self._queue = queue
        self._policy = policy
        self._wall_s = wall_s
        self.caches = Caches(queue.add)
        self._memory: dict[Key, _Memory] = {}
        # Jobs as they were last seen, so that the controller hears of it when one is deleted.
        self._known: dict[Key, Job] = {}
        self._farewells: dict[Key, float] = {}
        # By the job's name in the controller.
        self._keys: dict[str, Key] = {}

    async def run(self) -> None:
        """One worker. Never returns; an error postpones the job that it came from, and no other."""
        while True:
            key = await self._queue.take()
            try:
                await self._look(key)
            finally:
                self._queue.done(key)

    def controller_changed(self, job: str | None) -> None:
        """The controller's view of the job with this name in it has changed; None: of all."""
        if job is None:
            for key in self.caches.jobs:
                self._queue.add(key)
        elif job in self._keys:
            self._queue.add(self._keys[job])

    async def _look(self, key: Key) -> None:
        memory = self._memory.setdefault(key, _Memory())
        try:
            await self.reconcile(key)
            memory.failures = 0
        except ApiError as error:
            memory.failures += 1
            longest_s = 0.2 * 2.0 ** min(memory.failures, 20)
            pause_s = max(error.retry_after_s, random.uniform(0, min(longest_s, _LONGEST_PAUSE_S)))
            level = logging.INFO if error.conflict or error.missing else logging.WARNING
            _log.log(level, "%s/%s: %s; again in %.1f s", *key, error, pause_s)
            self._queue.add_later(key, pause_s)
        # One job's defect must not stop the others.
        except Exception:  # noqa: BLE001
            memory.failures += 1
            _log.exception("%s/%s: this is a defect of the operator", *key)
            self._queue.add_later(key, _LONGEST_PAUSE_S)

    async def reconcile(self, key: Key) -> None:
        """One look at one job. Raises ApiError where the API server did not do as it was told."""
        manifest = self.caches.jobs.get(key)
        if manifest is None:
            await self._bid_farewell(key)
            return
        self._farewells.pop(key, None)
        try:
            job = read_job(manifest)
        except ValueError as error:
            await self._refuse(manifest, str(error))
            return
        self._known[key] = job
        self._keys[job.controller_job] = key
        memory = self._memory.setdefault(key, _Memory())
        view, now_s = self._controller.view(job.controller_job), self._wall_s()
        found = [
            each
            for cache in (self.caches.pods, self.caches.budgets)
            for each in cache.of_job(key)
            if is_owned(each, job.uid)
        ]
        pods = read_pods((each for each in found if each["kind"] == POD.kind), job.uid)
        want = wanted(
            job, view, pods, self._policy.around, now_s=now_s, limits=self._policy.limits, objection=memory.objection
        )
        pace = replace(self._policy.pace, written_s=memory.written_s)
        todo, due_s = actions(want, job, found, now_s=now_s, pace=pace)
        objection = ""
        for action in todo:
            if objection and isinstance(action, Create):
                continue
            if objection and isinstance(action, WriteStatus):
                # The Secret was refused: it must not be on record as made.
                action = WriteStatus({**action.status, "credentials": job.record.manifest.get("credentials", "")})
            objection = await self._act(job, manifest, action, memory) or objection
        for request in want.requests:
            await self._controller.ask(request)
        self._appoint(key, now_s, due_s, want.look_again_s)
        self._object(key, memory, objection, any(isinstance(action, Create | Keep) for action in todo))

    def _appoint(self, key: Key, now_s: float, *times_s: float | None) -> None:
        soonest_s = min((each for each in times_s if each is not None), default=None)
        if soonest_s is not None:
            self._queue.add_later(key, soonest_s - now_s)

    def _object(self, key: Key, memory: _Memory, objection: str, tried: bool) -> None:
        """An object was refused: say so in the status, and try again, ever less often."""
        if objection:
            memory.objections += 1
            self._queue.add_later(key, min(2.0**memory.objections, _LONGEST_PAUSE_S))
        if (objection or tried) and objection != memory.objection:
            memory.objection = objection
            self._queue.add_later(key, 0.0)
        if tried and not objection:
            memory.objections = 0

    async def _act(self, job: Job, manifest: Manifest, action: Action, memory: _Memory) -> str:
        """Returns what the API server has against an object, if it refuses it for good; other errors are raised."""
        match action:
            case WriteStatus():
                patch = _status_patch(manifest, action)
                self.caches.jobs.put(await self._server.merge_status(JOB, job.namespace, job.name, patch))
                memory.written_s = self._wall_s()
            case Announce():
                await self._announce(job, action)
            case Create() | Keep():
                return await self._create(job, action)
            case Restore():
                metadata = action.manifest["metadata"]
                kind = KINDS[action.manifest["kind"]]
                await self._server.json_patch(kind, metadata["namespace"], metadata["name"], action.patch)
            case Delete():
                await self._delete(action)
            case DeleteJob():
                _log.info("%s/%s: its time to live is over", job.namespace, job.name)
                await self._server.delete(JOB, job.namespace, job.name, uid=job.uid)
        return ""

    async def _create(self, job: Job, action: Create | Keep) -> str:
        manifest = action.manifest
        kind, name = KINDS[manifest["kind"]], manifest["metadata"]["name"]
        try:
            made = await self._server.create(kind, manifest)
        except ApiError as error:
            if error.exists and isinstance(action, Keep):
                return await self._restore_secret(job, manifest)
            if error.passing or error.conflict or error.missing:
                raise
            return f"{kind.kind} {name}: {error}"
        if kind is POD:
            _log.info("%s/%s: made pod %s", job.namespace, job.name, name)
            self.caches.pods.put(made)
        elif kind is BUDGET:
            self.caches.budgets.put(made)
        return ""

    async def _restore_secret(self, job: Job, manifest: Manifest) -> str:
        """It is there: made by us before we could record it, or somebody else's, which the patch's test finds out."""
        name = manifest["metadata"]["name"]
        try:
            await self._server.json_patch(SECRET, job.namespace, name, restoring(manifest, "data"))
        except ApiError as error:
            if error.passing or error.conflict:
                raise
            return f"Secret {name} is there already and does not belong to this job; rename or delete it ({error})"
        return ""

    async def _delete(self, action: Delete) -> None:
        kind = KINDS[action.kind]
        cache = self.caches.pods if kind is POD else self.caches.budgets
        try:
            left = await self._server.delete(kind, action.namespace, action.name, uid=action.uid, force=action.force)
        except ApiError as error:
            if not (error.missing or error.conflict):
                raise
            # Gone, or replaced by another that is not meant.
            return
        _log.info("%s: deleted %s %s", action.namespace, kind.kind, action.name)
        if left.get("kind") == kind.kind:
            cache.put(left)

    async def _announce(self, job: Job, action: Announce) -> None:
        now = to_text(self._wall_s())
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{job.name}-", "namespace": job.namespace},
            "involvedObject": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
            },
            "type": action.type,
            "reason": action.reason,
            "message": action.message[:1000],
            "source": {"component": names.MANAGED_BY},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._server.create(EVENT, event)
        except ApiError as error:
            # It is for people to read; what it tells is in the status, too.
            _log.warning("an event could not be written: %s", error)

    async def _refuse(self, manifest: Manifest, why: str) -> None:
        """The API server let something pass that we cannot read: say so on the object, once."""
        metadata, status = manifest["metadata"], manifest.get("status") or {}
        if status.get("observedGeneration") == metadata.get("generation") and status.get("phase") == "Pending":
            return
        condition = {
            "type": "Accepted",
            "status": "False",
            "reason": "Invalid",
            "message": why,
            "lastTransitionTime": to_text(self._wall_s()),
        }
        content = {"observedGeneration": metadata.get("generation"), "phase": "Pending", "conditions": [condition]}
        patch = {"metadata": {"uid": metadata["uid"]}, "status": content}
        await self._server.merge_status(JOB, metadata["namespace"], metadata["name"], patch)

    async def _bid_farewell(self, key: Key) -> None:
        """The job was deleted while we looked: the controller forgets it once its nodes have left.

        Where it kept checkpoints, the record stays: it knows the generation that the folder's fence asks for, so the
        same name may go on from there.
        """
        job = self._known.get(key)
        if job is None or job.checkpoint is not None:
            self._forget(key)
            return
        since_s = self._farewells.setdefault(key, time.monotonic())
        view = self._controller.view(job.controller_job)
        if (view.reachable and view.job is None) or time.monotonic() - since_s > _FAREWELL_LIMIT_S:
            self._forget(key)
        elif view.reachable and view.job is not None and not view.job.active_nodes:
            await self._controller.ask(Forget(job.controller_job))
            self._forget(key)
        else:
            self._queue.add_later(key, _FAREWELL_LOOK_S)

    def _forget(self, key: Key) -> None:
        job = self._known.pop(key, None)
        if job is not None:
            self._keys.pop(job.controller_job, None)
        self._farewells.pop(key, None)
        self._memory.pop(key, None)


def _status_patch(manifest: Manifest, action: WriteStatus) -> Manifest:
    """A merge patch that only fits the object that was looked at."""
    before, metadata = manifest.get("status") or {}, manifest["metadata"]
    changed = {name: value for name, value in action.status.items() if before.get(name) != value}
    gone = {name: None for name in before if name not in action.status}
    known = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    return {"metadata": known, "status": {**changed, **gone}}
