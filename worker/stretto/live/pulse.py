"""What a live worker says unasked: that it lives, and how far it is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from stretto_proto.v1 import training_pb2 as pb

from stretto.live.generation import Generation
from stretto.live.settings import LiveSettings
from stretto.live.state import LiveState
from stretto.live.step_clock import StepClock
from stretto.progress_report import StepFigures
from stretto.stream import ReconnectingStream

_log = logging.getLogger(__name__)


class Pulse:
    """Sends heartbeats and progress, on a thread of its own, and looks after collectives that take long.

    state is read and changed with `lock` held; generation: the present one, or None, asked with it held too.
    """

    def __init__(
        self,
        state: LiveState,
        lock: threading.Condition,
        stream: ReconnectingStream[pb.TrainRequest, pb.TrainResponse],
        settings: LiveSettings,
        generation: Callable[[], Generation | None],
    ) -> None:
        self._state = state
        self._lock = lock
        self._stream = stream
        self._settings = settings
        self._generation = generation
        self._news = threading.Event()
        self._closed = False

    def start(self, clock: StepClock) -> None:
        """Begin; clock: what this worker works and waits at."""
        threading.Thread(target=self._run, args=(clock,), name="stretto-heartbeat", daemon=True).start()

    def wake(self) -> None:
        """Look at once whether there is something to say."""
        self._news.set()

    def close(self) -> None:
        """End the thread, soon."""
        self._closed = True
        self._news.set()

    def report(self, figures: StepFigures, left_s: float) -> None:
        """A step is committed; left_s: when, on the monotonic clock, the generation before this one was left."""
        with self._lock:
            progress = self._state.progress
            new = progress.generation != self._state.generation
            waiting = progress.unsent
            self._state.commit(figures, pause_s=time.monotonic() - left_s if new else 0.0)
        if new:
            self.flush()
        elif not waiting:
            self._news.set()

    def flush(self) -> None:
        """Send the progress that was not sent yet."""
        with self._lock:
            if not self._state.progress.unsent:
                return
            message = self._state.progress.message()
        self._stream.send(message, latest_of="progress")

    def _run(self, clock: StepClock) -> None:
        sent_s = beat_s = 0.0
        while not self._closed:
            interval_s = self._state.heartbeat_interval_s or 1.0
            now_s = time.monotonic()
            self._news.wait(max(min(beat_s + interval_s, self._next_report_s(sent_s)) - now_s, 0.005))
            now_s = time.monotonic()
            if self._state.progress.unsent and now_s >= self._next_report_s(sent_s):
                sent_s = now_s
                self.flush()
            if now_s < beat_s + interval_s:
                self._news.clear()
                continue
            beat_s = now_s
            self._beat(clock, now_s)

    def _beat(self, clock: StepClock, now_s: float) -> None:
        own_s, waiting_s, median_s = clock.read(now_s)
        with self._lock:
            message = self._state.alive(working_s=own_s, waiting_s=waiting_s, median_step_s=median_s)
            generation = self._generation()
        self._stream.send(message, latest_of="alive")
        # Not only while this worker is known to wait: DDP has collectives of its own, in its second step for one.
        if generation is not None and clock.quiet_s(now_s) > self._settings.stalled_s:
            try:
                generation.suspect()
            except Exception:  # noqa: BLE001
                # This thread's heartbeats show that the process lives: they go on.
                _log.exception("asking the peers failed")

    def _next_report_s(self, sent_s: float) -> float:
        """When progress may be sent again; far away while there is none."""
        if not self._state.progress.unsent:
            return sent_s + 3600.0
        place = self._state.assignment
        first = place is not None and place.rank == 0
        return sent_s + (self._settings.report_interval_s if first else self._settings.other_ranks_report_interval_s)
