"""A runner on a clock that stands still and a store that saves when the test says so."""

from __future__ import annotations

import asyncio

from stretto_controller.core.events import NodeHello, WorkerHello, WorkerProgressed
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobSpec, Mode, Ready
from stretto_controller.core.report import Progress
from stretto_controller.runner import Clocks, Runner
from stretto_controller.sessions import Outbox, StreamAction
from stretto_controller.settings import ServiceLimits
from stretto_controller.store.contents import Leader, Save, Stored, StoreError

SPEC = JobSpec(min_nodes=1, max_nodes=1, mode=Mode.RESTART, base_batch_size=32, batch_size=32, target_tau=100.0)


class SlowStore:
    """A store that saves when the test says so; what was asked for waits in `asked`."""

    def __init__(self, stored: Stored | None = None) -> None:
        self.asked: list[tuple[Save, asyncio.Future[None]]] = []
        self.saved: list[Save] = []
        self.lost = asyncio.Event()
        # Another controller, once it leads.
        self.led_by = Leader()
        self._stored = stored or Stored()

    @property
    def leader(self) -> Leader:
        return self.led_by

    @property
    def lost_reason(self) -> str:
        return ""

    async def lead(self, me: Leader) -> None:
        """At once."""

    def leads(self) -> bool:
        return self.led_by == Leader()

    async def load(self) -> Stored:
        return self._stored

    def save(self, save: Save) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked.append((save, future))
        return future

    async def finish(self, count: int | None = None) -> None:
        """The oldest `count` saves, or all, are on disk now."""
        for _ in range(len(self.asked) if count is None else count):
            save, future = self.asked.pop(0)
            self.saved.append(save)
            future.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def fail(self) -> None:
        self.asked.pop(0)[1].set_exception(StoreError("disk full"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def close(self) -> None:
        await self.finish()


class Bench:
    """A runner on a slow store and a clock that stands still until the test moves it."""

    def __init__(self, stored: Stored | None = None, **service: int) -> None:
        self.now_s = 1000.0
        self.wall_s = 1.7e9
        self.store = SlowStore(stored)
        clocks = Clocks(lambda: self.now_s, lambda: self.wall_s)
        self.runner = Runner(
            self.store, ServiceLimits(tick_interval_s=3600.0, **service), Limits(settle_s=0.1), clocks=clocks
        )
        self.runner.start(stored or Stored())

    def open(self, session_id: str, length: int = 100) -> Stream:
        stream = Stream(Outbox(length))
        self.runner.sessions.open(session_id, stream.outbox)
        return stream

    def join(self, job: str, node_id: str, spec: JobSpec = SPEC, *, session_id: str = "") -> Stream:
        """A node that says hello and is ready."""
        session_id = session_id or f"{job}-{node_id}"
        stream = self.open(session_id)
        self.runner.submit(job, hello(node_id, session_id, spec))
        return stream

    async def train(self, job: str) -> None:
        """One worker of a job that runs in generation 1."""
        self.open(f"{job}-w")
        self.runner.submit(job, WorkerHello(f"{job}-w", "n0", 0, 0, 1, SPEC))
        await self.store.finish()

    async def progress(self, job: str, **figures: float) -> None:
        values = {"generation": 1, "step": 1, **figures}
        self.runner.submit(job, WorkerProgressed(f"{job}-w", Progress(**values)))  # type: ignore[arg-type]  # ints
        await self.store.finish()


class Stream:
    """What has been put on one stream so far."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.end: Exception | None = None

    async def sent(self) -> list[StreamAction]:
        """Take what is there now."""
        taken: list[StreamAction] = []
        try:
            async with asyncio.timeout(0):
                async for action in self.outbox.actions():
                    taken.append(action)  # noqa: PERF401  # it ends with an exception
        except TimeoutError:
            pass
        except Exception as end:  # noqa: BLE001
            self.end = end
        return taken


def hello(node_id: str, session_id: str, spec: JobSpec = SPEC, key: str = "") -> NodeHello:
    return NodeHello(node_id, key or f"key {node_id}", session_id, 1, "127.0.0.1", spec, ready=Ready(1))
