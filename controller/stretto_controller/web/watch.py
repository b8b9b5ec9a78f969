"""Following a job's events: first those that are kept, then each as it is saved."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from sse_starlette import ServerSentEvent

from stretto_controller.core.errors import Rejected
from stretto_controller.runner import Runner
from stretto_controller.store.contents import StoredEvent
from stretto_controller.web.schema import event_out


class Watchers:
    """At most `limit` followers at a time."""

    def __init__(self, runner: Runner, limit: int) -> None:
        self._runner = runner
        self._limit = limit
        self._count = 0

    def kept(self, job: str, after: int) -> list[StoredEvent]:
        """The kept events after a sequence number. Raises Rejected when there is no such job."""
        return [event for event in self._runner.view(job).events if event.sequence > after]

    def follow(self, job: str, after: int) -> AsyncIterator[ServerSentEvent]:
        """Every event after a sequence number, until the job is deleted. Raises Rejected only before it begins."""
        self._runner.view(job)
        self.admit()
        return self._follow(job, after)

    def admit(self) -> None:
        """Raise Rejected when there is no room for one more."""
        if self._count >= self._limit:
            raise Rejected.exhausted(f"{self._limit} event streams are open, the limit here; try again later")

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One follower is there for as long as this lasts."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    async def _follow(self, job: str, after: int) -> AsyncIterator[ServerSentEvent]:
        with self.counted():
            while (news := self._runner.news(job)) is not None:
                for event in self.kept(job, after):
                    after = event.sequence
                    yield ServerSentEvent(event_out(event).model_dump_json(), id=str(after), event=event.kind)
                await news.wait()
            yield ServerSentEvent("{}", event="deleted")
