"""Golden traces: stories told by the real core, compared with tests/traces. STRETTO_REWRITE_TRACES=1 rewrites them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from core.story import Story

TRACES = Path(__file__).parent.parent / "traces"


class Stories:
    """The stories of one test module, by name."""

    def __init__(self) -> None:
        self._stories: dict[str, Callable[[], Story]] = {}

    def tell(self, story: Callable[[], Story]) -> Callable[[], Story]:
        """Register a story under its function's name."""
        self._stories[story.__name__] = story
        return story

    @property
    def names(self) -> list[str]:
        return list(self._stories)

    def check(self, name: str) -> None:
        told = "\n".join(self._stories[name]().lines) + "\n"
        path = TRACES / f"{name}.txt"
        if os.environ.get("STRETTO_REWRITE_TRACES"):
            path.write_text(told)
        assert path.read_text() == told
