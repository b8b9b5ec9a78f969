"""A process of people who never stop asking: each repeats a request until it is acknowledged, and writes that down.

    python people.py ENDPOINTS JOURNAL

JOURNAL gets a JSON line for each acknowledged request: when, what, of which job, with which number of nodes, and how
long it took. The process ends after its present request once a line comes on its standard input.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stretto.client import JobsClient
from stretto.errors import NotFound, Retry
from stretto_proto.v1 import types_pb2 as types

REGISTER = "register"
TRAINING = "job"
MOST_NODES = 4000
_SPEC = types.JobSpec(min_nodes=1, max_nodes=MOST_NODES, mode=types.RECONFIGURE_MODE_RESTART)
_PAUSE_S = 0.1


class People:
    """One after the other, so that the order of what was acknowledged is the order of the requests."""

    def __init__(self, client: JobsClient, journal: Path) -> None:
        self._client = client
        self._journal = journal.open("a", buffering=1)
        self._rng = random.Random(7)
        self._numbers = itertools.count(2)
        self._jobs = itertools.count()
        self._paused = False
        self._training_paused = False

    def begin(self) -> None:
        self._ask("create", REGISTER, MOST_NODES)

    def next(self) -> None:
        """One request, whatever it takes until it is acknowledged."""
        what = self._rng.random()
        if what < 0.45:
            self._ask("scale", REGISTER, next(self._numbers))
        elif what < 0.65:
            self._paused = not self._paused
            self._ask("pause" if self._paused else "resume", REGISTER)
        elif what < 0.8:
            self._ask("create", f"kept-{next(self._jobs)}", MOST_NODES)
        elif what < 0.9:
            name = f"gone-{next(self._jobs)}"
            self._ask("create", name, MOST_NODES)
            self._ask("delete", name)
        else:
            self._ask("scale", TRAINING, self._rng.randint(2, 4))

    def end(self) -> None:
        self._ask("scale", TRAINING, 4)

    def _ask(self, what: str, job: str, nodes: int = 0) -> None:
        began_s, attempts = time.time(), 0
        while True:
            attempts += 1
            try:
                self._once(what, job, nodes)
                break
            except Retry:
                time.sleep(_PAUSE_S)
        ended_s = time.time()
        entry: dict[str, Any] = {"what": what, "job": job, "nodes": nodes, "attempts": attempts}
        self._journal.write(json.dumps({**entry, "time_s": ended_s, "took_s": ended_s - began_s}) + "\n")

    def _once(self, what: str, job: str, nodes: int) -> None:
        """One attempt. Raises Retry when nobody answered: it may have been done."""
        client = self._client
        if what == "create":
            client.create(job, _SPEC, desired_nodes=nodes)
        elif what == "scale":
            assert client.scale(job, nodes).desired_nodes == nodes
        elif what == "pause":
            client.pause(job)
        elif what == "resume":
            client.resume(job)
        else:
            try:
                client.delete(job)
            except NotFound:
                # An attempt that was not answered did it.
                assert what == "delete"


def main() -> None:
    endpoints, journal = sys.argv[1:]
    ended = threading.Event()

    def end() -> None:
        sys.stdin.readline()
        ended.set()

    threading.Thread(target=end, daemon=True).start()
    with JobsClient(endpoints, timeout_s=2.0) as client:
        people = People(client, Path(journal))
        people.begin()
        while not ended.is_set():
            people.next()
            ended.wait(_PAUSE_S)
        people.end()


if __name__ == "__main__":
    main()
