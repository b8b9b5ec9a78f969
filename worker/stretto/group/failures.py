"""Why a generation is over or never began. After each of them the caller asks for a newer assignment."""

from __future__ import annotations

from stretto.errors import Rejoin


class Superseded(Rejoin):
    """A newer assignment exists: the build was given up for it. Nobody is to blame."""


class BuildFailed(Rejoin):
    """The generation could not be formed. `unreachable`: the ranks that did not get there."""

    def __init__(self, reason: str, unreachable: tuple[int, ...] = ()) -> None:
        super().__init__(f"{reason} (unreachable ranks: {_listed(unreachable)})")
        self.reason = reason
        self.unreachable = unreachable


class GroupBroken(Rejoin):
    """The generation is over. `unreachable`: the ranks whose process was gone when it was cut.

    Tensors that were given to this generation's operations may still be written to: drop them.
    """

    def __init__(self, reason: str, unreachable: tuple[int, ...] = ()) -> None:
        super().__init__(f"{reason} (unreachable ranks: {_listed(unreachable)})")
        self.reason = reason
        self.unreachable = unreachable

    def again(self) -> GroupBroken:
        """The same news in a fresh exception: one that is raised twice collects the frames of both."""
        return GroupBroken(self.reason, self.unreachable)


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) or "none"
