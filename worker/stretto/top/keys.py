"""Single keys from a terminal, without waiting for Return."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_NAMED = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\r": "enter",
    "\n": "enter",
    "\x1b": "no",
}


@contextmanager
def single_keys() -> Iterator[None]:
    """The terminal hands keys over at once and does not print them; as before afterwards, whatever happens."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def next_keys(timeout_s: float) -> list[str]:
    """The keys pressed by then, by name where they have one; empty when none was."""
    descriptor = sys.stdin.fileno()
    if not select.select([descriptor], [], [], timeout_s)[0]:
        return []
    pressed = os.read(descriptor, 1024)
    if not pressed:
        # The terminal has gone.
        return ["q"]
    return split(pressed.decode(errors="replace"))


def split(text: str) -> list[str]:
    """Keys, of what a terminal sent in one piece."""
    found = []
    while text:
        length = next((size for size in (3, 1) if text[:size] in _NAMED), 1)
        found.append(_NAMED.get(text[:length], text[:length]))
        text = text[length:]
    return found
