"""A worker's state is modelled as its history: the steps that it contains. Equal histories are one object."""

from __future__ import annotations

from collections.abc import Iterator


class State:
    """What training has come to after `step` steps, the last of which was done in `generation` on samples start..end.

    torn: it was replaced in parts, and the sender died before the last one came: no such state may ever be used.
    """

    __slots__ = ("_next", "end", "generation", "parent", "start", "step", "torn")

    def __init__(self, parent: State | None, generation: int, start: int, end: int, *, torn: bool = False) -> None:
        self.parent = parent
        self.generation = generation
        self.step: int = 0 if parent is None else parent.step + 1
        self.start = start
        self.end = end
        self.torn = torn
        self._next: dict[tuple[int, int, int], State] = {}

    def after(self, generation: int, start: int, end: int) -> State:
        """The state after one more step. Whoever does the same step from the same state comes to the same one."""
        key = (generation, start, end)
        state = self._next.get(key)
        if state is None:
            state = self._next[key] = State(self, generation, start, end)
        return state

    def contains(self, other: State) -> bool:
        """Whether every step of the other state is in this one."""
        return self.at(other.step) is other

    def at(self, step: int) -> State | None:
        """The state as it was after that step; None if it never came so far."""
        state: State | None = self
        while state is not None and state.step > step:
            state = state.parent
        return state if state is not None and state.step == step else None

    def steps(self) -> Iterator[State]:
        """From the latest back to the first."""
        state: State | None = self
        while state is not None and state.parent is not None:
            yield state
            state = state.parent

    def __repr__(self) -> str:
        return f"step {self.step} of generation {self.generation}" + " (torn)" * self.torn


def fresh() -> State:
    """The state before the first step."""
    return State(None, 0, 0, 0)
