"""Full garbage collections at moments of our own choosing.

One looks at every object there is: half a second with 5,000 streams open, in which nobody is answered. Python's own
rule asks for it again and again, since each message replaces values that had grown old. Reference counts free those;
cycles come from errors and ended streams only, some kilobytes each.
"""

from __future__ import annotations

import asyncio
import gc

# Objects made, less those freed, between two collections of the youngest; and so many of these to one of the next.
_YOUNG, _MIDDLE = 10_000, 20
_NEVER = 1_000_000
FULL_INTERVAL_S = 600.0


async def collect_on(interval_s: float = FULL_INTERVAL_S) -> None:
    """Collect young garbage as Python does, but all of it only every `interval_s` seconds, until cancelled."""
    before = gc.get_threshold()
    gc.set_threshold(_YOUNG, _MIDDLE, _NEVER)
    try:
        while True:
            await asyncio.sleep(interval_s)
            gc.collect()
    finally:
        gc.set_threshold(*before)
