"""A node's conversation with the controller, from its first join to its end.

What the node wants and what it was told is kept here, under one lock; messages only carry it. So a connection
that breaks loses nothing: the next one begins with a Hello that says it again. No torch in this module.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum

from stretto_proto.v1 import rendezvous_pb2 as pb
from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousStub

from stretto.errors import Fatal, Retry
from stretto.stream import ReconnectingStream

_log = logging.getLogger(__name__)

# To a Ready: a place (restart mode), or leave to start workers that will ask for their places themselves.
Answer = pb.NodeAssignment | pb.StartWorkers

# Without an answer for so long, say once what is being waited for.
_TELL_AFTER_S = 3.0


class End(Enum):
    """How a generation came to its end for a node whose workers are done."""

    FINISHED = "finished"
    # The node was dismissed, or refused.
    DISMISSED = "dismissed"
    # Other members' workers are stopped; this node has done its part.
    STOPPED = "stopped"
    TIMEOUT = "timeout"


class Dismissal(Exception):
    """The controller wants this node no longer."""

    def __init__(self, success: bool, reason: str) -> None:
        super().__init__(reason)
        self.success = success
        self.reason = reason


class Attendance:
    """One Attend stream, kept up from the first `ask` on.

    Any thread may call; only `ask`, `wait_for_end` and `leave` block.
    """

    def __init__(
        self, endpoints: Sequence[str], hello: pb.NodeHello, *, on_force: Callable[[], None] = lambda: None
    ) -> None:
        """hello: who this node is; its generation and ready are filled in here, each time.

        on_force: the workers are to be killed. Called on the stream's thread, so it must not block.
        """
        self._hello = hello
        self._on_force = on_force
        self._endpoints = ",".join(endpoints)
        self._changed = threading.Condition()
        self._ready: pb.NodeReady | None = None
        self._present: Answer | None = None
        # Generations up to this one are over.
        self._stopped = 0
        # In-process mode: the workers that run are to be stopped, whatever generation they are in.
        self._halted = False
        self._finished = 0
        self._succeeded: int | None = None
        self._dismissed: pb.NodeDismissed | None = None
        self._refusal: Fatal | None = None
        self._leave: pb.NodeLeave | None = None
        self._heartbeat_interval_s = 0.0
        self._heart: threading.Thread | None = None
        self._started = False
        self._stream: ReconnectingStream[pb.AttendRequest, pb.AttendResponse] = ReconnectingStream(
            endpoints,
            lambda channel, requests: RendezvousStub(channel).Attend(requests),
            self._opening,
            self._receive,
            on_lost=self._lost,
            on_fatal=self._refused,
            name=f"stretto-attend-{hello.node_id}",
        )

    @property
    def generation(self) -> int:
        """The generation that this node's workers run in; 0 while it has none, and in in-process mode."""
        with self._changed:
            return self._number()

    @property
    def must_stop(self) -> bool:
        """The workers' generation is over, or the node is not wanted any more. Takes microseconds."""
        with self._changed:
            return self._is_over()

    @property
    def released(self) -> bool:
        """The controller expects nothing more from this node."""
        with self._changed:
            return bool(self._dismissed or self._refusal or self._is_finished())

    def ask(self, ready: pb.NodeReady, join_timeout_s: float) -> Answer:
        """Wait for the answer to `ready`, as a spare for as long as it takes.

        Raises Dismissal; Fatal when the controller refuses this node; Retry when no controller could be reached
        for join_timeout_s on end.
        """
        with self._changed:
            self._ready, self._present, self._halted = ready, None, False
            first, self._started = not self._started, True
        if first:
            self._stream.start()
        else:
            self._stream.send(pb.AttendRequest(ready=ready))
        asked_s = away_since_s = time.monotonic()
        told = False
        with self._changed:
            while (answer := self._answer()) is None:
                now_s = time.monotonic()
                away_since_s = now_s if self._stream.connected else away_since_s
                if now_s - away_since_s >= join_timeout_s:
                    raise Retry(
                        f"no controller could be reached at {self._endpoints} for {join_timeout_s:g} s; "
                        "is `stretto controller` running there?"
                    )
                if not told and now_s - asked_s >= _TELL_AFTER_S:
                    told = True
                    self._tell_what_is_awaited(join_timeout_s)
                self._changed.wait(min(1.0, join_timeout_s))
            return answer

    def succeed(self, generation: int) -> None:
        """Say that all workers of this node ended well. generation: theirs; 0 in in-process mode."""
        with self._changed:
            self._succeeded = generation
        self._stream.send(pb.AttendRequest(succeeded=pb.NodeSucceeded(generation=generation)))

    def wait_for_end(self, timeout_s: float) -> End:
        """Wait until nobody needs this node's agent any more: after `succeed`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_finished() or self._is_over(), timeout_s)
            if self._is_finished():
                return End.FINISHED
            if self._dismissed or self._refusal:
                return End.DISMISSED
            return End.STOPPED if self._is_over() else End.TIMEOUT

    def leave(self, reason: pb.LeaveReason.ValueType, message: str, timeout_s: float) -> None:
        """Say goodbye, unless nobody waits for it, and end the stream. May be called again."""
        if not self.released:
            with self._changed:
                self._leave = self._leave or pb.NodeLeave(reason=reason, message=message)
            self._stream.send(pb.AttendRequest(leave=self._leave))
            self._stream.close(timeout_s)
        else:
            self._stream.close()
        with self._changed:
            self._changed.notify_all()

    def _tell_what_is_awaited(self, join_timeout_s: float) -> None:
        """At the level that torchrun shows: who waits in silence looks hung."""
        if self._stream.connected:
            _log.warning(
                "node %s has no place in job %s yet: it waits as a spare, or for nodes that are missing",
                self._hello.node_id,
                self._hello.job,
            )
        else:
            _log.warning("no controller can be reached at %s; trying for %g s", self._endpoints, join_timeout_s)

    def _number(self) -> int:
        return self._present.generation.number if isinstance(self._present, pb.NodeAssignment) else 0

    def _is_over(self) -> bool:
        return bool(self._dismissed or self._refusal) or self._halted or 0 < self._number() <= self._stopped

    def _is_finished(self) -> bool:
        return self._succeeded is not None and self._finished > 0 and self._succeeded <= self._finished

    def _answer(self) -> Answer | None:
        if self._dismissed is not None:
            raise Dismissal(self._dismissed.success, self._dismissed.reason)
        if self._refusal is not None:
            raise self._refusal
        return self._present

    def _opening(self) -> list[pb.AttendRequest]:
        with self._changed:
            hello = pb.NodeHello()
            hello.CopyFrom(self._hello)
            if self._present is not None:
                hello.generation = self._number()
            elif self._ready is not None:
                hello.ready.CopyFrom(self._ready)
            messages = [pb.AttendRequest(hello=hello)]
            if self._succeeded is not None and self._succeeded == hello.generation:
                messages.append(pb.AttendRequest(succeeded=pb.NodeSucceeded(generation=self._succeeded)))
            if self._leave is not None:
                messages.append(pb.AttendRequest(leave=self._leave))
            return messages

    def _receive(self, response: pb.AttendResponse) -> None:
        kind = response.WhichOneof("body")
        forced = False
        with self._changed:
            if kind == "welcome":
                self._welcome(response.welcome)
            elif kind == "assignment":
                self._take(response.assignment)
            elif kind == "start_workers":
                self._take(response.start_workers)
            elif kind == "stop_workers":
                forced = self._stop(response.stop_workers)
            elif kind == "generation_finished":
                self._finished = max(self._finished, response.generation_finished.generation)
            elif kind == "dismissed":
                self._dismissed = response.dismissed
                _log.info("dismissed: %s", response.dismissed.reason)
            self._changed.notify_all()
        if forced:
            self._on_force()
        if kind == "dismissed":
            # Nothing more will be said; whoever comes back would only be told again.
            self._stream.close()

    def _take(self, answer: Answer) -> None:
        if self._ready is not None and answer.request_id == self._ready.request_id:
            self._present = answer

    def _stop(self, stop: pb.StopWorkers) -> bool:
        """True if the workers that run are to be killed. While none run, only an older generation can be meant."""
        if isinstance(self._present, pb.StartWorkers):
            self._halted = True
            _log.warning("stopping the workers of this node: %s", stop.reason)
            return stop.force
        if stop.generation > self._stopped:
            self._stopped = stop.generation
            _log.info("generation %d is over: %s", self._stopped, stop.reason)
        return False

    def _welcome(self, welcome: pb.NodeWelcome) -> None:
        self._heartbeat_interval_s = welcome.heartbeat_interval_s
        if self._heart is None and welcome.heartbeat_interval_s > 0:
            self._heart = threading.Thread(target=self._beat, name="stretto-heartbeat", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        while not self._stream.ended:
            heartbeat = pb.NodeHeartbeat(generation=self.generation)
            self._stream.send(pb.AttendRequest(heartbeat=heartbeat), latest_of="heartbeat")
            time.sleep(self._heartbeat_interval_s)

    def _lost(self, reason: str) -> None:
        _log.info("lost the controller (%s); workers go on, reconnecting", reason)
        with self._changed:
            self._changed.notify_all()

    def _refused(self, error: Fatal) -> None:
        with self._changed:
            self._refusal = error
            self._changed.notify_all()
