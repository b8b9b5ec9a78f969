"""A bidirectional gRPC stream that comes back by itself: for agents and for workers.

The stream is kept by one daemon thread. Threads do not survive a fork, and gRPC must not be used in a forked
child (a DataLoader's, for example): there `send` does nothing and returns False. No torch in this module.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import grpc

from stretto.channel import leader_of, open_channel
from stretto.errors import FATAL_CODES, Fatal, from_rpc_error

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamSettings:
    # Full jitter: the n-th wait is uniform in 0..min(max_backoff_s, first_backoff_s * 2**n).
    first_backoff_s: float = 0.05
    # Longer spares a controller that restarts under thousands of streams; shorter finds it sooner.
    max_backoff_s: float = 2.0
    # A connection without its first answer by then is given up: the peer may be frozen.
    answer_timeout_s: float = 5.0
    # ... after twice as long for each such attempt in a row, up to this, where there is one endpoint only: a controller
    # under thousands of streams that come back together is late for all of them, and would answer nobody in time.
    answer_limit_s: float = 20.0
    # More unsent messages than this, and the connection counts as broken; the next opening says it all again.
    queue_limit: int = 1024

    def validate(self) -> None:
        """Raise ValueError unless every limit is positive."""
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be above 0")


class _Outbox(Generic[RequestT]):
    """The requests of one connection, in order: what gRPC's sending thread iterates over."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._condition = threading.Condition()
        self._messages: OrderedDict[str | int, RequestT] = OrderedDict()
        self._next_key = 0
        self._ended = False

    def put(self, message: RequestT, latest_of: str | None = None) -> bool:
        """Queue a message, or replace a waiting one of the same kind; False if there is no room."""
        with self._condition:
            if self._ended:
                return False
            key: str | int = latest_of if latest_of is not None else self._next_key
            self._next_key += 1
            if key not in self._messages and len(self._messages) >= self._limit:
                return False
            self._messages[key] = message
            self._condition.notify()
            return True

    def finish(self) -> None:
        """Take nothing more; what is queued is still sent."""
        with self._condition:
            self._ended = True
            self._condition.notify()

    def abandon(self) -> None:
        """Drop what is queued, and end."""
        with self._condition:
            self._messages.clear()
            self._ended = True
            self._condition.notify()

    def __iter__(self) -> Iterator[RequestT]:
        return self

    def __next__(self) -> RequestT:
        with self._condition:
            self._condition.wait_for(lambda: self._messages or self._ended)
            if not self._messages:
                raise StopIteration
            return self._messages.popitem(last=False)[1]


class ReconnectingStream(Generic[RequestT, ResponseT]):
    """Keeps one stream to one of `endpoints` open, and says hello first each time.

    endpoints: `host:port` each (`stretto.channel.parse_endpoints`); each attempt takes the next one, or goes at
        once to the controller that a follower names as its leader.
    open_call(channel, requests): starts the call, e.g. `lambda c, r: RendezvousStub(c).Attend(r)`.
    make_hello(): the opening messages of a connection, hello first, then whatever must be said again. The
        rule: what was queued or sent on a connection that broke, or while there was none, is *dropped*. So
        change your state first, then `send`; make_hello, called on the stream's thread once the new
        connection's queue is open, speaks from the state.
    on_message(response): on the stream's thread; must not block for long. A connection's first is a welcome.
    on_connected(): before the first message of each connection is handed on.
    on_lost(reason): a connection that had been welcomed broke; the next attempt follows by itself.
    on_fatal(error): a status that another attempt would only meet again (stretto.errors.FATAL_CODES), or an
        exception of one of these callbacks. The stream has ended. At most once, on the stream's thread.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        open_call: Callable[[grpc.Channel, Iterator[RequestT]], Any],
        make_hello: Callable[[], Sequence[RequestT]],
        on_message: Callable[[ResponseT], None],
        *,
        on_connected: Callable[[], None] = lambda: None,
        on_lost: Callable[[str], None] = lambda reason: None,
        on_fatal: Callable[[Fatal], None] = lambda error: None,
        settings: StreamSettings | None = None,
        name: str = "stretto-stream",
    ) -> None:
        if not endpoints:
            raise ValueError("endpoints is empty; give at least one host:port")
        self._endpoints = tuple(endpoints)
        self._open_call = open_call
        self._make_hello = make_hello
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_fatal = on_fatal
        self._settings = settings or StreamSettings()
        self._settings.validate()
        self._rng = random.Random()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._outbox: _Outbox[RequestT] | None = None
        self._call: Any = None
        self._connected = False
        # Attempts in a row that got no answer in time.
        self._unanswered = 0
        # Where the latest attempt was told that the leader is.
        self._leader = ""
        self._closing = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._thread.start()

    @property
    def connected(self) -> bool:
        """The controller has answered on the present connection."""
        return self._connected

    @property
    def ended(self) -> bool:
        """Closed, or ended by a fatal status: nothing will be sent or received any more."""
        return self._stopped.is_set() or (self._thread.ident is not None and not self._thread.is_alive())

    def send(self, message: RequestT, *, latest_of: str | None = None) -> bool:
        """Queue a message; never blocks. False if it was dropped: the next connection's opening must say it.

        latest_of: a kind of message of which only the latest counts; it replaces one that still waits.
        """
        if os.getpid() != self._pid:
            return False
        with self._lock:
            outbox, call = self._outbox, self._call
        if outbox is None or self._closing.is_set():
            return False
        if outbox.put(message, latest_of):
            return True
        outbox.abandon()
        if call is not None:
            call.cancel()
        return False

    def close(self, flush_timeout_s: float = 0.0) -> bool:
        """End the stream; True if the controller took all that was sent, and ended its side, in that time.

        While there is no connection, attempts go on until the time is over. May be called again, and from
        callbacks (then it does not wait).
        """
        if os.getpid() != self._pid:
            return False
        deadline_s = time.monotonic() + flush_timeout_s
        with self._lock:
            self._closing.set()
            if self._outbox is not None:
                self._outbox.finish()
        inside = threading.current_thread() is self._thread
        if self._thread.is_alive() and not inside and flush_timeout_s > 0:
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
        flushed = not self._thread.is_alive()
        self._stopped.set()
        with self._lock:
            outbox, call = self._outbox, self._call
        if outbox is not None:
            outbox.abandon()
        if call is not None:
            call.cancel()
        if self._thread.is_alive() and not inside:
            self._thread.join(1.0)
        return flushed

    def _run(self) -> None:
        attempts = 0
        position = 0
        while not self._stopped.is_set():
            opened_s = time.monotonic()
            told, self._leader = self._leader, ""
            endpoint = told or self._endpoints[position % len(self._endpoints)]
            try:
                finished = self._attend(endpoint)
            except Fatal as error:
                self._end(error)
                return
            except Exception as error:  # noqa: BLE001  (a callback's bug must not end the thread in silence)
                _log.exception("the stream to %s ends: a callback failed", endpoint)
                failure = Fatal(f"the stream to {endpoint} ended by an error of ours: {error!r}")
                failure.__cause__ = error
                self._end(failure)
                return
            if finished:
                self._stopped.set()
                return
            position += 0 if told else 1
            if self._leader and not told:
                continue
            # A connection that lasted starts the backoff anew; one that broke at once does not.
            attempts = 0 if time.monotonic() - opened_s > self._settings.max_backoff_s else attempts
            bound_s = min(self._settings.max_backoff_s, self._settings.first_backoff_s * 2.0 ** min(attempts, 30))
            self._stopped.wait(self._rng.uniform(0.0, bound_s))
            attempts += 1

    def _end(self, error: Fatal) -> None:
        self._stopped.set()
        self._on_fatal(error)

    def _attend(self, endpoint: str) -> bool:
        """One connection, from its opening to its end; True if it ended because `close` asked for it."""
        outbox: _Outbox[RequestT] = _Outbox(self._settings.queue_limit)
        with self._lock:
            # Set before the hello is made: what is said from here on is sent, the rest is in the state.
            self._outbox = outbox
        call = watchdog = None
        channel = open_channel(endpoint, several=len(self._endpoints) > 1)
        reason = "the controller ended the stream"
        try:
            opening = self._make_hello()
            call = self._open_call(channel, _chain(opening, outbox))
            watchdog = threading.Timer(self._patience_s(), call.cancel)
            watchdog.daemon = True
            watchdog.start()
            with self._lock:
                self._call = call
                if self._closing.is_set():
                    outbox.finish()
            if self._stopped.is_set():
                return True
            self._receive(call, watchdog)
        except grpc.RpcError as error:
            failure = from_rpc_error(error, endpoint=endpoint)
            if error.code() in FATAL_CODES:
                raise failure from error
            reason = str(failure)
            self._leader = leader_of(error)
            if error.code() is grpc.StatusCode.CANCELLED and not self._connected:
                self._unanswered += 1
        else:
            if self._closing.is_set():
                return True
        finally:
            if watchdog is not None:
                watchdog.cancel()
            was_connected, self._connected = self._connected, False
            with self._lock:
                self._outbox = self._call = None
            outbox.abandon()
            if call is not None:
                call.cancel()
            channel.close()
        if was_connected and not self._stopped.is_set():
            _log.info("lost the stream to %s: %s", endpoint, reason)
            self._on_lost(reason)
        return False

    def _patience_s(self) -> float:
        settings = self._settings
        if len(self._endpoints) > 1:
            # Another one may lead by then.
            return settings.answer_timeout_s
        longest_s = max(settings.answer_timeout_s, settings.answer_limit_s)
        return min(longest_s, settings.answer_timeout_s * 2.0 ** min(self._unanswered, 30))

    def _receive(self, call: Any, watchdog: threading.Timer) -> None:
        for response in call:
            watchdog.cancel()
            if not self._connected:
                self._connected = True
                self._unanswered = 0
                self._on_connected()
            self._on_message(response)


def _chain(opening: Sequence[RequestT], outbox: _Outbox[RequestT]) -> Iterator[RequestT]:
    yield from opening
    yield from outbox
