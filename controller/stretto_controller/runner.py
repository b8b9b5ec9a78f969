"""The one place that acts: clock -> core.job.step -> save -> send.

A decision that changes what is durable is saved first; only then are its actions sent and its outcome shown. While
it is being saved the next events are decided on the state in memory, and their actions wait their turn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from stretto_controller.core import job as core
from stretto_controller.core.actions import Decision, Forget
from stretto_controller.core.errors import Rejected
from stretto_controller.core.events import (
    Event,
    JobCreated,
    NodeHeartbeat,
    NodeHello,
    Recovered,
    StreamClosed,
    Tick,
    WorkerAlive,
    WorkerProgressed,
    WorkerStreamClosed,
)
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobState
from stretto_controller.figures import DECISION_BOUNDS, Observations
from stretto_controller.ledger import Job, Moment, Release
from stretto_controller.sessions import Sessions
from stretto_controller.settings import ServiceLimits
from stretto_controller.snapshot import JobView
from stretto_controller.store.contents import Leader, Save, Store, Stored, StoreError
from stretto_controller.tracing import Tracing

_log = logging.getLogger("stretto.controller")

# Events that come each second from each stream: they never bring the next wake-up forward.
_FREQUENT = (NodeHeartbeat, WorkerAlive, WorkerProgressed)
# A wake-up that is due already still leaves the loop time for others.
_SHORTEST_WAIT_S = 0.005


class Unavailable(Exception):
    """This controller decides nothing: it stops, it could not save, or another one leads, at `leader`."""

    def __init__(self, message: str, leader: Leader | None = None) -> None:
        super().__init__(message)
        self.leader = leader or Leader()


@dataclass(frozen=True, slots=True)
class Clocks:
    """monotonic_s decides; wall_s is for display only."""

    monotonic_s: Callable[[], float] = time.monotonic
    wall_s: Callable[[], float] = time.time


class Runner:
    """All jobs of one controller, for one term of its lead. Everything here runs on the event loop's thread."""

    def __init__(self, store: Store, service: ServiceLimits, limits: Limits, *, clocks: Clocks | None = None) -> None:
        self.sessions = Sessions()
        self.decision_seconds = Observations(DECISION_BOUNDS)
        self.store_errors = 0
        # Told of each decision that is saved; None: nobody asked for traces.
        self.tracing: Tracing | None = None
        # Set once a save has failed: what was decided since cannot be kept, so the process must end.
        self.failed = asyncio.Event()
        self.failure: StoreError | None = None
        self._store = store
        self._service = service
        self._limits = limits
        self._clocks = clocks or Clocks()
        self._jobs: dict[str, Job] = {}
        # Those that are forgotten as soon as that is saved. Until then they are shown.
        self._forgotten: dict[str, Job] = {}
        self._last_sequence = 0
        self._running = False
        self._started = False
        # Each job's latest save that is not done.
        self._saves: dict[str, asyncio.Future[None]] = {}

    def start(self, stored: Stored) -> None:
        """Go on from what was saved, and tell each job that the controller is back: this one leads now."""
        self._started = True
        self._last_sequence = stored.last_sequence
        self._running = True
        for kept in stored.jobs:
            job = Job(kept.record.name, self._service)
            job.load(kept)
            job.ticked_s = self._clocks.monotonic_s()
            self._jobs[job.name] = job
            self.submit(job.name, Recovered())
        if stored.jobs:
            _log.info("recovered jobs: %s", ", ".join(sorted(self._jobs)))

    async def stop(self) -> None:
        """Decide nothing more and wait until what was decided is saved. Streams that end now are not noted."""
        self._running = False
        for job in self._jobs.values():
            job.cancel_wake_up()
            points, anew = job.curve.take_unsaved()
            if points and self.failure is None:
                self._save(job, Save(job.name, points=points, points_anew=anew))
        if self._saves:
            await asyncio.wait(set(self._saves.values()))

    @property
    def ready(self) -> bool:
        """Whether this controller decides: it has started, it leads, and every save so far went well."""
        return self._running and self.failure is None and self._store.leads()

    @property
    def reason_not_ready(self) -> str:
        """Why this controller does not decide, for probes."""
        if self.failure is not None and self._store.leads():
            return f"a save failed: {self.failure}"
        return str(self._unavailable())

    def refuse_unless_leading(self) -> None:
        """Raise Unavailable, with the leader's address, where another controller may know better."""
        if self._started and self._store.leads():
            return
        leader = self._store.leader
        if leader.grpc_address:
            raise Unavailable(f"this controller does not lead; the one at {leader.grpc_address} does", leader)
        raise Unavailable("no controller leads at the moment; ask again in a second")

    def lose(self, reason: str) -> None:
        """The lead is lost: nothing that was decided and not yet sent counts any more."""
        if self.failure is None:
            self.failure = StoreError(f"this controller does not lead any more: {reason}")
            _log.warning("%s", self.failure)
            self.failed.set()

    def submit(self, name: str, event: Event) -> None:
        """Decide on one event now; its actions follow when it is saved.

        Raises Rejected, and then nothing changed; Unavailable when this controller decides nothing any more.
        """
        if not self.ready:
            raise self._unavailable()
        job = self._jobs.get(name)
        if job is None:
            job = self._admit(name, event)
        now_s = self._clocks.monotonic_s()
        started_s = time.perf_counter()
        decision = core.step(name, job.state, event, now_s=now_s, limits=self._limits)
        self.decision_seconds.observe(time.perf_counter() - started_s)
        self._jobs[name] = job
        if isinstance(event, NodeHello):
            self.sessions.bind(name, event.node_id, event.session_id)
        self._carry_out(job, decision, now_s)
        if not (decision.quiet or isinstance(event, _FREQUENT)):
            self._plan(job, now_s)

    async def decide(self, name: str, event: Event) -> None:
        """As `submit`, but returns, or raises Rejected, only when all that it rests on is saved."""
        try:
            self.submit(name, event)
        finally:
            await self.settled(name)

    def close_stream(self, name: str, event: StreamClosed | WorkerStreamClosed) -> None:
        """Note that a stream has ended, for whatever reason. Never raises: there is nobody to tell."""
        if isinstance(event, StreamClosed):
            self.sessions.unbind(name, event.node_id, event.session_id)
        if not self.ready or name not in self._jobs:
            return
        try:
            self.submit(name, event)
        except Rejected as rejection:
            _log.debug("job %s: a closed stream was not noted: %s", name, rejection.message)

    async def settled(self, name: str) -> None:
        """Wait until every decision on the job so far is saved and shown. Raises Unavailable when one cannot be."""
        saved = self._saves.get(name)
        if saved is not None:
            # Shielded: the save goes on when the one who waits for it is cancelled.
            try:
                await asyncio.shield(saved)
            except StoreError as error:
                raise Unavailable(str(error)) from error
        if self.failure is not None or not self._store.leads():
            # It may be saved. It is not shown here: an answer would tell of the job as it was before.
            raise self._unavailable()

    def views(self) -> list[JobView]:
        """Every job, by name."""
        now_s = self._clocks.monotonic_s()
        views = [self._view(name, now_s) for name in sorted(self._jobs.keys() | self._forgotten.keys())]
        return [view for view in views if view is not None]

    def view(self, name: str) -> JobView:
        """One job. Raises Rejected when there is none of this name."""
        view = self._view(name, self._clocks.monotonic_s())
        if view is None:
            raise Rejected.not_found(f"there is no job {name!r}; `stretto jobs list` shows those that exist")
        return view

    def _view(self, name: str, now_s: float) -> JobView | None:
        """As far as it is saved: a name that is used again shows the job before it until then."""
        found = (self._jobs.get(name), self._forgotten.get(name))
        views = (job.view(now_s) for job in found if job is not None)
        return next((view for view in views if view is not None), None)

    def states(self) -> list[JobState]:
        """Every job that is not finished, as decided, by name: for what is decided next, not to be shown."""
        states = (self._jobs[name].state for name in sorted(self._jobs))
        return [state for state in states if state is not None and not state.record.phase.finished]

    def news(self, name: str) -> asyncio.Event | None:
        """Set at the job's next event or end; None when there is no such job."""
        job = self._jobs.get(name)
        return job.news if job else None

    def wall_s(self) -> float:
        return self._clocks.wall_s()

    def _unavailable(self) -> Unavailable:
        if self.failure is not None:
            return Unavailable(str(self.failure), self._store.leader)
        try:
            self.refuse_unless_leading()
        except Unavailable as error:
            return error
        return Unavailable("this controller is stopping")

    def _admit(self, name: str, event: Event) -> Job:
        if isinstance(event, JobCreated | NodeHello) and len(self._jobs) >= self._service.max_jobs:
            raise Rejected.exhausted(
                f"this controller keeps {len(self._jobs)} jobs and may keep {self._service.max_jobs}; "
                "delete finished ones (`stretto jobs delete NAME`) or raise max_jobs"
            )
        job = Job(name, self._service)
        job.ticked_s = self._clocks.monotonic_s()
        return job

    def _carry_out(self, job: Job, decision: Decision, now_s: float) -> None:
        """Save if anything durable changed, then, in order, let the actions go."""
        previous = job.state
        release = job.note(decision, Moment(now_s, self._clocks.wall_s()), self._last_sequence)
        self._last_sequence += len(release.events)
        record = decision.state.record
        record_changed = previous is None or record is not previous.record
        forget = any(isinstance(action, Forget) for action in decision.actions)
        if forget:
            # The name is free from now on; the object lives until its last actions have gone.
            job.cancel_wake_up()
            job.state = None
            del self._jobs[job.name]
            self._forgotten[job.name] = job
        job.releases.append(release)
        if forget or record_changed or release.events or release.generations or release.points:
            release.saved = self._save(
                job,
                Save(
                    job.name,
                    record if record_changed else None,
                    release.marks,
                    release.events,
                    release.generations,
                    release.points,
                    release.points_anew,
                    forget,
                ),
            )
        self._let_go(job)

    def _save(self, job: Job, save: Save) -> asyncio.Future[None]:
        saved = self._store.save(save)
        self._saves[job.name] = saved

        def done(_: asyncio.Future[None]) -> None:
            if self._saves.get(job.name) is saved:
                del self._saves[job.name]
            error = saved.exception()
            if error is None:
                self._let_go(job)
            else:
                self._fail(job, error)

        # Before anyone can wait for it: who waits sees the decision shown and sent.
        saved.add_done_callback(done)
        return saved

    def _let_go(self, job: Job) -> None:
        """Show and send every decision that no longer waits for a save, its own or an earlier one's."""
        # Asked for each: this process may have been stopped for a while at any point.
        while job.releases and self.failure is None and self._store.leads():
            release = job.releases[0]
            if release.saved is not None and (not release.saved.done() or release.saved.exception()):
                return
            job.releases.popleft()
            job.show(release)
            if self.tracing is not None:
                self.tracing.note(job.name, release.state, release.actions, release.wall_s)
            self._log_reason(job, release)
            for action in release.actions:
                self.sessions.send(job.name, action)
                if isinstance(action, Forget) and self._forgotten.get(job.name) is job:
                    del self._forgotten[job.name]

    def _fail(self, job: Job, error: BaseException) -> None:
        self.store_errors += 1
        if self.failure is None:
            self.failure = error if isinstance(error, StoreError) else StoreError(str(error))
            _log.critical("job %s: a decision was not saved and is not acted upon: %s", job.name, error)
            self.failed.set()

    def _plan(self, job: Job, now_s: float) -> None:
        """Plan the next wake-up, which is a look at every node: once for events that come together."""
        if now_s - job.planned_s >= _SHORTEST_WAIT_S:
            self._plan_wake_up(job, now_s)
        elif not job.plans:
            job.plans = True
            asyncio.get_running_loop().call_later(_SHORTEST_WAIT_S, self._plan_late, job)

    def _plan_late(self, job: Job) -> None:
        job.plans = False
        if self._running:
            self._plan_wake_up(job, self._clocks.monotonic_s())

    def _plan_wake_up(self, job: Job, now_s: float) -> None:
        state = job.state
        if state is None:
            return
        job.planned_s = now_s
        wake_s = core.next_wake_s(state, self._limits)
        if not state.record.phase.finished:
            latest_s = job.ticked_s + self._service.tick_interval_s
            wake_s = latest_s if wake_s is None else min(wake_s, latest_s)
        job.plan_wake_up(None if wake_s is None else max(_SHORTEST_WAIT_S, wake_s - now_s), self._wake)

    def _wake(self, job: Job) -> None:
        if not self.ready or job.state is None:
            return
        job.ticked_s = self._clocks.monotonic_s()
        try:
            self.submit(job.name, Tick())
        except Exception:  # noqa: BLE001
            # A fault of ours in one job: its state is unchanged, and the others go on.
            _log.exception("job %s: a tick failed", job.name)
            self._plan_wake_up(job, job.ticked_s)

    def _log_reason(self, job: Job, release: Release) -> None:
        """One line whenever the reason is a new one."""
        if release.reason and release.reason != job.logged_reason:
            job.logged_reason = release.reason
            record = release.state.record
            number = record.generation.number if record.generation else 0
            fields = {"job": job.name, "generation": number, "phase": record.phase.value, "reason": release.reason}
            _log.info("job %(job)s, generation %(generation)d, %(phase)s: %(reason)s", fields, extra=fields)
