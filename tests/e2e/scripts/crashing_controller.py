"""`stretto` whose controller dies by kill -9 at a chosen point between a decision, its save and what is sent of it.

python crashing_controller.py POINT COUNT controller ...      it dies when it comes to the point for the COUNT-th time
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from stretto.cli import main
from stretto_controller.service.streams import Conversation
from stretto_controller.sessions import Sessions
from stretto_controller.store.database import Database
from stretto_controller.store.sqlite import SqliteStore

# Where, as (class, method, whether before it is carried out or after).
POINTS: dict[str, tuple[Any, str, bool]] = {
    "decided, not yet handed to the store": (SqliteStore, "save", True),
    "handed to the store": (SqliteStore, "save", False),
    "about to be written": (Database, "commit", True),
    "half written": (Database, "_apply", False),
    "written, nobody told": (Database, "commit", False),
    "about to be sent": (Sessions, "send", True),
    "queued for its stream": (Sessions, "send", False),
    "an agent comes": (Conversation, "serve", True),
}


def _deadly(method: Callable[..., Any], count: int, *, before: bool) -> Callable[..., Any]:
    left = count

    def dying(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if before and left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        found = method(*arguments)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return dying


if __name__ == "__main__":
    target, name, before = POINTS[sys.argv[1]]
    setattr(target, name, _deadly(getattr(target, name), int(sys.argv[2]), before=before))
    del sys.argv[1:3]
    main()
