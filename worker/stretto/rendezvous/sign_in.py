"""How a worker tells its agent that it uses Stretto: it leaves a file with its number in a directory of the agent's.

In in-process mode a script that knows nothing of Stretto would train alone, beside the other nodes' workers that do
the same. Its agent knows it by the missing file. No torch in this module: workers import it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)

SIGN_IN_VARIABLE = "STRETTO_SIGN_IN"


def sign_in(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the agent that this worker has begun a session; nothing happens where no agent asks for it.

    To be called as soon as the session begins, before RANK is changed: it is the worker's number on its node until
    the first assignment. (LOCAL_RANK is 0 for all workers under torchrun's --virtual-local-rank.)
    """
    directory = environ.get(SIGN_IN_VARIABLE)
    if not directory:
        return
    try:
        (Path(directory) / str(int(environ["RANK"]))).touch()
    except OSError as error:
        _log.warning("cannot tell the agent that this worker uses stretto (%s); the agent will say it does not", error)


def signed_in(directory: Path) -> set[int]:
    """The numbers of the workers that have signed in; none where the directory has gone."""
    found: set[int] = set()
    with suppress(OSError):
        found = {int(name) for name in os.listdir(directory) if name.isdecimal()}
    return found
