"""A command on a real pseudo-terminal of 80 x 24."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress

import pyte

PATIENCE_S = 60.0


class Terminal:
    """A command on a pseudo-terminal of 80 x 24, and what a person would see there."""

    def __init__(self, *command: str) -> None:
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        # Not pty.fork: this process has gRPC's threads, and the child of a fork would crash in them.
        self._master, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment["TERM"] = "xterm-256color"
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    @property
    def pid(self) -> int:
        """Of the command, which leads a process group of its own."""
        return self._process.pid

    @property
    def text(self) -> str:
        return "\n".join(self._screen.display)

    def until(self, condition: Callable[[str], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition(self.text):
            assert time.monotonic() < deadline_s, f"it did not show:\n{self.text}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self._stream.feed(os.read(self._master, 65536))
                except OSError:
                    assert condition(self.text), f"it ended:\n{self.text}"

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def exit_code(self) -> int:
        """Of the command, which is about to end; what it still says is read meanwhile."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self._process.poll() is None:
            assert time.monotonic() < deadline_s, self.text
            if select.select([self._master], [], [], 0.05)[0]:
                with suppress(OSError):
                    self._stream.feed(os.read(self._master, 65536))
        return self._process.returncode

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
