"""The demonstration's plot: what happens next, given what can be seen. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

MAX_NODES = 4
# Each membership trains so many steps before the next thing happens to it.
SHOWN_STEPS = 60


@dataclass(frozen=True, slots=True)
class View:
    """What the plot looks at: the job, as the controller tells it."""

    members: tuple[str, ...] = ()
    # Steps that the present members have made together.
    steps: int = 0
    # Nodes that are there, but not among the members.
    waiting: tuple[str, ...] = ()


class Deed(Enum):
    START = "start"
    SCALE = "scale"
    KILL = "kill"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Scene:
    """Something that is done once `due`; the scenes come in their order. `target`: a node, or a number of nodes."""

    text: str
    due: Callable[[View], bool]
    deed: Deed
    target: str


def _trained(members: int) -> Callable[[View], bool]:
    return lambda view: len(view.members) == members and view.steps >= SHOWN_STEPS


def _at_once(view: View) -> bool:
    return True


SCENES = (
    Scene("One node starts the job.", _at_once, Deed.START, "node-1"),
    Scene("A second node comes: workers leave after an agreed step.", _trained(1), Deed.START, "node-2"),
    Scene("Two nodes are enough for now.", _trained(2), Deed.SCALE, "2"),
    Scene("Two more nodes come, and wait as spares.", _at_once, Deed.START, "node-3"),
    Scene("", _at_once, Deed.START, "node-4"),
    Scene("Four nodes are wanted: one change takes both.", lambda view: len(view.waiting) >= 2, Deed.SCALE, "4"),
    Scene("kill -9: the first node's agent and worker.", _trained(4), Deed.KILL, "node-1"),
    Scene("SIGTERM: another node drains.", _trained(3), Deed.DRAIN, "node-2"),
)


class Story:
    """Where the plot stands."""

    def __init__(self, scenes: tuple[Scene, ...] = SCENES) -> None:
        self._scenes = scenes
        self._next = 0

    @property
    def told(self) -> bool:
        """Everything has happened."""
        return self._next == len(self._scenes)

    def due(self, view: View) -> Scene | None:
        """The next scene, if its time has come."""
        if self.told or not self._scenes[self._next].due(view):
            return None
        return self._scenes[self._next]

    def done(self) -> None:
        """The scene that was due has been played."""
        assert not self.told, "the story is over"
        self._next += 1
