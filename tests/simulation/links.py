"""Streams to the controller: they keep the order of messages, lose some when they break, and come back by themselves.

`Stream` is the client's end, as `stretto.stream.ReconnectingStream` behaves; `Connection` is one connection of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from simulation.world import World

FIRST_BACKOFF_S = 0.05
# As worker/stretto/live/session.py and rendezvous/attendance.py set them.
WORKER_BACKOFF_S = 1.0
AGENT_BACKOFF_S = 2.0
ANSWER_TIMEOUT_S = 5.0
# How often a stream opens in the very moment at which something is said.
_TWICE = 0.15
# A frozen process looks again after this.
_FROZEN_LOOK_S = 0.3


class Speaker(Protocol):
    """A process that keeps a stream."""

    name: str
    node_id: str
    alive: bool
    frozen: bool

    def opening(self) -> Sequence[Any]: ...

    def said_again(self) -> Sequence[Any]: ...

    def hear(self, message: Any) -> None: ...

    def refused(self, reason: str) -> None: ...

    def connection_lost(self) -> None: ...


class Connection:
    """One connection, from its hello to its end. What is under way when it breaks is lost."""

    def __init__(self, world: World, stream: Stream, session_id: str) -> None:
        self.world = world
        self.stream = stream
        self.speaker = stream.speaker
        self.session_id = session_id
        # The controller's process that it leads to; its end ends all of them.
        self.life = world.controller.life
        # Nothing passes any more, in either direction.
        self.broken = False
        self.welcomed = False
        # By the controller, though the client may not know yet.
        self.ended = False
        # For the controller: the hello was accepted, and by whom.
        self.accepted = False
        self.peer: Any = None
        self._sent_s = [0.0, 0.0]
        self._held: tuple[list[Any], list[Any]] = ([], [])

    def to_controller(self, message: Any) -> None:
        self._send(0, message)

    def to_client(self, message: Any) -> None:
        self._send(1, message)

    def break_(self, *, client_delay_s: float, controller_delay_s: float) -> None:
        """End it; each side notices in its own time."""
        if self.broken:
            return
        self.broken = True
        self.stream.broken_s = self.world.scheduler.now_s
        scheduler = self.world.scheduler
        scheduler.after(client_delay_s, self.stream.noticed, self)
        scheduler.after(controller_delay_s, self.world.controller.noticed, self)

    def end(self, reason: str | None) -> None:
        """The controller ends it after what was sent. reason: a refusal for good, to be shown to a person."""
        if not self.ended:
            self.ended = True
            self._send(1, _End(reason))
            self.world.scheduler.after(self.world.delay_s(), self.world.controller.noticed, self)

    def close(self) -> None:
        """The client ends it after what was sent."""
        self._send(0, _End(None))

    def release(self) -> None:
        """What was held up by a cut network or a frozen process may pass now."""
        for direction in (0, 1):
            held = self._held[direction]
            while held and not self.broken and not self._blocked(direction):
                self._pass(direction, held.pop(0))

    def _send(self, direction: int, message: Any) -> None:
        if self.broken:
            return
        scheduler = self.world.scheduler
        arrival_s = max(self._sent_s[direction], scheduler.now_s + self.world.delay_s())
        self._sent_s[direction] = arrival_s
        scheduler.after(arrival_s - scheduler.now_s, self._arrive, direction, message)

    def _blocked(self, direction: int) -> bool:
        if direction and self.speaker.frozen:
            return True
        return (self.speaker.node_id, direction) in self.world.network.cut_off

    def _arrive(self, direction: int, message: Any) -> None:
        if self.broken:
            return
        held = self._held[direction]
        if held or self._blocked(direction):
            held.append(message)
        else:
            self._pass(direction, message)

    def _pass(self, direction: int, message: Any) -> None:
        if isinstance(message, _End):
            self._pass_end(direction, message)
        elif direction:
            self.stream.receive(self, message)
        elif self.life == self.world.controller.life and not self.ended:
            self.world.controller.receive(self, message)

    def _pass_end(self, direction: int, end: _End) -> None:
        self.broken = True
        if direction:
            self.stream.noticed(self, end.reason)
        else:
            self.world.controller.noticed(self)


class _End:
    def __init__(self, reason: str | None) -> None:
        self.reason = reason


class Stream:
    """The client's end: opens one connection after the other until it is closed or refused for good."""

    def __init__(self, world: World, speaker: Speaker, max_backoff_s: float) -> None:
        self.world = world
        self.speaker = speaker
        self.connection: Connection | None = None
        self.closed = False
        # The controller has heard of this process.
        self.was_answered = False
        # When one last broke by a fault.
        self.broken_s = 0.0
        self._max_backoff_s = max_backoff_s
        self._attempts = 0
        self._opened_s = 0.0
        self._count = 0

    @property
    def connected(self) -> bool:
        """The controller has answered on the present connection."""
        return self.connection is not None and self.connection.welcomed

    def start(self) -> None:
        self._open()

    def send(self, message: Any) -> None:
        """Dropped where there is no connection: the next opening says what counts."""
        if self.connection is not None and not self.closed:
            self.connection.to_controller(message)

    def close(self) -> None:
        """What was sent may still arrive."""
        if self.connection is not None and not self.closed:
            self.connection.close()
        self.closed = True

    def die(self, *, silently: bool) -> None:
        """The process is gone. silently: with its machine, so that nothing closes the connection."""
        self.closed = True
        if self.connection is not None:
            late = silently or (self.speaker.node_id, 0) in self.world.network.cut_off
            delay_s = self.world.rng.uniform(5.0, 15.0) if late else self.world.delay_s()
            self.connection.break_(client_delay_s=0.0, controller_delay_s=delay_s)

    def receive(self, connection: Connection, message: Any) -> None:
        if connection is not self.connection or not self.speaker.alive:
            return
        connection.welcomed = self.was_answered = True
        self.speaker.hear(message)

    def noticed(self, connection: Connection, refusal: str | None = None) -> None:
        """The client sees that the connection has ended."""
        if connection is not self.connection or not self.speaker.alive:
            return
        if self.speaker.frozen:
            self._later(_FROZEN_LOOK_S, self.noticed, connection, refusal)
            return
        self.connection = None
        if self.closed:
            return
        if refusal is not None:
            self.closed = True
            self.speaker.refused(refusal)
            return
        if connection.welcomed:
            self.speaker.connection_lost()
        self._try_again()

    def _try_again(self) -> None:
        if self.world.scheduler.now_s - self._opened_s > self._max_backoff_s:
            self._attempts = 0
        bound_s = min(self._max_backoff_s, FIRST_BACKOFF_S * 2.0**self._attempts)
        self._attempts += 1
        self._later(self.world.rng.uniform(0.0, bound_s), self._open)

    def _open(self) -> None:
        if self.closed or not self.speaker.alive or self.connection is not None:
            return
        if self.speaker.frozen:
            self._later(_FROZEN_LOOK_S, self._open)
            return
        world, controller = self.world, self.world.controller
        self._opened_s = world.scheduler.now_s
        if not controller.up:
            self._try_again()
            return
        self._count += 1
        connection = Connection(world, self, f"{self.speaker.name}#{self._count}")
        self.connection = connection
        controller.connections.append(connection)
        for message in self.speaker.opening():
            connection.to_controller(message)
        if world.faults.says_twice or world.rng.random() < _TWICE:
            # What is said while the opening is being made is said in it, and again.
            again = self.speaker.said_again()
            if world.faults.says_twice:
                # A little later, but before the answer can have come.
                self._later(world.setup.delay_s * world.rng.random(), self._say, connection, again)
            else:
                self._say(connection, again)
        self._later(ANSWER_TIMEOUT_S, self._give_up_unanswered, connection)

    def _say(self, connection: Connection, messages: Sequence[Any]) -> None:
        for message in messages:
            connection.to_controller(message)

    def _give_up_unanswered(self, connection: Connection) -> None:
        if connection is self.connection and not connection.welcomed and not connection.broken:
            connection.break_(client_delay_s=0.0, controller_delay_s=self.world.delay_s())

    def _later(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self.world.scheduler.after(delay_s, call, *args)
