"""Ends a process that is stuck where only torch could free it: its agent starts it again, which takes seconds."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_STUCK = 85  # the exit code that says: the watchdog fired


class Watchdog:
    """Runs `on_stuck(section)` once for each watched section that lasts longer than `limit_s`.

    The default ends the process. Needs the interpreter's lock to fire: a section that holds it while it hangs is the
    agent's to end, as any hang is.
    """

    def __init__(self, limit_s: float, on_stuck: Callable[[str], None] | None = None) -> None:
        self._limit_s = limit_s
        self._on_stuck = on_stuck or end_process
        self._changed = threading.Condition()  # guards the sections; held for dictionary work only
        self._sections: dict[object, tuple[float, str]] = {}
        self.firings = 0
        threading.Thread(target=self._run, name="stretto-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watch(self, section: str) -> Iterator[None]:
        """Watch what happens inside."""
        key = object()
        with self._changed:
            self._sections[key] = (time.monotonic() + self._limit_s, section)
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._sections.pop(key, None)

    def _run(self) -> None:
        while True:
            section = self._next_stuck()
            self.firings += 1
            self._on_stuck(section)

    def _next_stuck(self) -> str:
        with self._changed:
            while True:
                key = min(self._sections, key=lambda each: self._sections[each][0], default=None)
                if key is None:
                    self._changed.wait()
                    continue
                deadline_s, section = self._sections[key]
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    del self._sections[key]
                    return section
                self._changed.wait(left_s)


def end_process(section: str) -> None:
    """End this process at once, with every thread's stack on stderr and an exit code of its own."""
    print(f"stretto: stuck in {section}; this worker ends so that its agent starts it again", file=sys.stderr)
    with contextlib.suppress(Exception):  # stderr may not be a file
        faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_STUCK)
