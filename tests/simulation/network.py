"""Who can reach whom: nodes among each other, and nodes and the controller."""

from __future__ import annotations


class Network:
    """Directions that nothing passes. A connection needs both of its directions to make progress."""

    def __init__(self) -> None:
        # (node_id, 0): nothing from the node reaches the controller; (node_id, 1): nothing comes from the controller.
        self.cut_off: set[tuple[str, int]] = set()
        # (from, to): nothing passes between the workers of these nodes in this direction.
        self._cut: set[tuple[str, str]] = set()
        # Machines without power: nothing answers there, not even to say that nobody is there.
        self.dark: set[str] = set()

    def linked(self, one: str, other: str) -> bool:
        """Whether workers of the two nodes can talk with each other."""
        if one == other:
            return one not in self.dark
        cut = self._cut
        if cut and ((one, other) in cut or (other, one) in cut):
            return False
        return not self.dark or (one not in self.dark and other not in self.dark)

    def cut(self, sender: str, receiver: str) -> None:
        self._cut.add((sender, receiver))

    def heal(self, sender: str, receiver: str) -> None:
        self._cut.discard((sender, receiver))

    def heal_all(self) -> None:
        """Everything passes; machines without power stay so."""
        self.cut_off.clear()
        self._cut.clear()
