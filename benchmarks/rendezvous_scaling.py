"""N agents that join at once: seconds until all have their places, messages and bytes; ours and torch's default.

usage: python benchmarks/rendezvous_scaling.py [--nodes 32,64,256] [--processes 4] [--backends stretto,c10d] [--check]

The agents are threads of a few processes, all on this machine, with the controller (or torch's store) beside them.
min_nodes = max_nodes = N, so that neither backend waits for stragglers. Bytes are those of the messages themselves,
without what gRPC, or the store's protocol, puts around them. --check fails unless our messages grow linearly and 256
nodes take less than 2 s.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

# torch's default takes more than half a minute for 256 on two quiet cores, and never comes to an end on busy ones.
JOIN_LIMIT_S = 120.0
GOAL_NODES, GOAL_S = 256, 2.0
# Messages per node at the largest size may be so many times those at the smallest.
LINEAR_WITHIN = 1.25


@dataclass
class Traffic:
    """What one process's agents sent and received. Counted under a lock: agents are threads."""

    messages: int = 0
    size_bytes: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def count(self, size_bytes: int) -> None:
        with self._lock:
            self.messages += 1
            self.size_bytes += size_bytes


@dataclass(frozen=True)
class Outcome:
    backend: str
    nodes: int
    first_s: float
    median_s: float
    all_s: float
    messages: int
    size_bytes: int
    errors: tuple[str, ...] = ()


def join_stretto(endpoint: str, nodes: int, traffic: Traffic) -> Callable[[], Any]:
    """One agent of ours, made and ready to join."""
    from stretto.rendezvous.handler import StrettoHandler
    from stretto.rendezvous.settings import AgentSettings

    settings = AgentSettings((endpoint,), f"scaling-{nodes}", nodes, nodes, address="127.0.0.1")
    handler = StrettoHandler(settings)
    return lambda: (handler.next_rendezvous(), handler)


def count_stretto(traffic: Traffic) -> None:
    """Count every message of this process's Attend streams."""
    from stretto.rendezvous import attendance
    from stretto_proto.v1.rendezvous_pb2_grpc import RendezvousStub as Stub

    def counted(messages: Any) -> Iterator[Any]:
        for message in messages:
            traffic.count(message.ByteSize())
            yield message

    class CountedCall:
        """A call as ReconnectingStream uses it."""

        def __init__(self, call: Any) -> None:
            self.cancel = call.cancel
            self._responses = counted(call)

        def __iter__(self) -> Iterator[Any]:
            return self._responses

    class CountingStub:
        def __init__(self, channel: Any) -> None:
            self._stub = Stub(channel)

        def Attend(self, requests: Any) -> CountedCall:  # the call's name
            return CountedCall(self._stub.Attend(counted(requests)))

    vars(attendance)["RendezvousStub"] = CountingStub


def join_c10d(endpoint: str, nodes: int, traffic: Traffic) -> Callable[[], Any]:
    """One agent's rendezvous as torchrun makes it by default, made and ready to join."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it at run time only
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    class CountedBackend(C10dRendezvousBackend):
        """A state read is one answer; a state written is the old one, the new one, and an answer."""

        def get_state(self) -> Any:
            state = super().get_state()
            traffic.count(0)
            traffic.count(len(state[0]) * 4 // 3 if state else 0)
            return state

        def set_state(self, state: bytes, token: Any = None) -> Any:
            written = super().set_state(state, token)
            traffic.count((len(state) + len(token or b"")) * 4 // 3)
            traffic.count(len(state) * 4 // 3)
            return written

    host, port = endpoint.rsplit(":", 1)
    store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=JOIN_LIMIT_S))
    params = RendezvousParameters(
        "c10d", endpoint, "scaling", nodes, nodes, "127.0.0.1", join_timeout=2 * int(JOIN_LIMIT_S)
    )
    handler = create_handler(store, CountedBackend(store, "scaling"), params)
    return lambda: (handler.next_rendezvous(), handler)


JOIN = {"stretto": join_stretto, "c10d": join_c10d}


def run_agents(
    backend: str, endpoint: str, nodes: int, share: int, barrier: Barrier, results: multiprocessing.Queue[Any]
) -> None:
    """One process with `share` agents: join at the barrier, report, and end without goodbyes."""
    logging.disable(logging.CRITICAL)
    traffic = Traffic()
    if backend == "stretto":
        count_stretto(traffic)
    joins = [JOIN[backend](endpoint, nodes, traffic) for _ in range(share)]
    times: list[tuple[float, float]] = []
    errors: list[str] = []
    kept: list[Any] = []

    def join(ask: Callable[[], Any]) -> None:
        try:
            asked_s = time.monotonic()
            kept.append(ask())
            times.append((asked_s, time.monotonic()))
        except Exception as error:  # noqa: BLE001  # a benchmark reports every failure
            errors.append(repr(error)[:200])

    threads = [threading.Thread(target=join, args=(ask,), daemon=True) for ask in joins]
    barrier.wait(JOIN_LIMIT_S)
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + JOIN_LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    missing = [f"no place within {JOIN_LIMIT_S:g} s"] * (share - len(times) - len(errors))
    results.put((list(times), errors + missing, traffic.messages, traffic.size_bytes))
    # torch's first agents serve the others until all have answered.
    barrier.wait(2 * JOIN_LIMIT_S)
    os._exit(0)


def measure(backend: str, endpoint: str, nodes: int, processes: int) -> Outcome:
    """Let `nodes` agents join at once."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Any] = context.Queue()
    barrier = context.Barrier(processes + 1)
    shares = [len(range(index, nodes, processes)) for index in range(processes)]
    workers = [
        context.Process(target=run_agents, args=(backend, endpoint, nodes, share, barrier, results), daemon=True)
        for share in shares
    ]
    for worker in workers:
        worker.start()
    barrier.wait(JOIN_LIMIT_S)
    reports = [results.get(timeout=JOIN_LIMIT_S + 60) for _ in workers]
    barrier.wait(JOIN_LIMIT_S)
    for worker in workers:
        worker.join()
    times = [pair for report in reports for pair in report[0]]
    started_s = min((asked_s for asked_s, _ in times), default=0.0)
    waits_s = sorted(answered_s - started_s for _, answered_s in times)
    # Agents that had no answer in time wait for ever, as far as the figures go.
    waits_s += [math.inf] * (nodes - len(waits_s))
    return Outcome(
        backend=backend,
        nodes=nodes,
        first_s=round(waits_s[0], 3),
        median_s=round(waits_s[len(waits_s) // 2], 3),
        all_s=round(waits_s[-1], 3),
        messages=sum(report[2] for report in reports),
        size_bytes=sum(report[3] for report in reports),
        errors=tuple(error for report in reports for error in report[1]),
    )


@contextmanager
def controller() -> Iterator[str]:
    """A controller of its own, in its own process, as in real life; its endpoint."""
    with tempfile.TemporaryDirectory() as directory:
        ready = Path(directory, "ready.json")
        command = [str(Path(sys.executable).with_name("stretto")), "controller", "--grpc-port", "0", "--http-port", "0"]
        command += ["--data-dir", directory, "--ready-file", str(ready)]
        with Path(directory, "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"the controller ended: {Path(directory, 'log').read_text()}")
                time.sleep(0.02)
            yield str(json.loads(ready.read_text())["grpc"])
        finally:
            process.terminate()
            process.wait()


@contextmanager
def store() -> Iterator[str]:
    """The store that torchrun's first agent hosts by default; its endpoint. Here it has this process for itself."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it at run time only

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield f"127.0.0.1:{server.port}"


SERVER = {"stretto": controller, "c10d": store}


def check(outcomes: list[Outcome]) -> list[str]:
    """What is not as it should be."""
    ours = [outcome for outcome in outcomes if outcome.backend == "stretto"]
    problems = [f"{o.backend}, {o.nodes} nodes: {o.errors[0]}" for o in outcomes if o.errors]
    per_node = {outcome.nodes: outcome.messages / outcome.nodes for outcome in ours}
    if ours and per_node[max(per_node)] > LINEAR_WITHIN * per_node[min(per_node)]:
        problems.append(f"messages per node grow with the number of nodes: {per_node}")
    slow = [outcome for outcome in ours if outcome.nodes <= GOAL_NODES and outcome.all_s > GOAL_S]
    return problems + [f"{outcome.nodes} nodes took {outcome.all_s} s, more than {GOAL_S} s" for outcome in slow]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="32,64,256")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--backends", default="stretto,c10d")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    # Ended by SIGTERM, it ends its processes, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = []
    print(f"{'backend':8} {'nodes':>5} {'first':>8} {'median':>8} {'all':>8} {'messages':>9} {'per node':>9} {'MB':>8}")
    for nodes in map(int, args.nodes.split(",")):
        for backend in args.backends.split(","):
            with SERVER[backend]() as endpoint:
                outcome = measure(backend, endpoint, nodes, args.processes)
            outcomes.append(outcome)
            print(
                f"{backend:8} {nodes:5} {outcome.first_s:7.3f}s {outcome.median_s:7.3f}s {outcome.all_s:7.3f}s "
                f"{outcome.messages:9} {outcome.messages / nodes:9.1f} {outcome.size_bytes / 1e6:8.2f}"
                + (f"  {len(outcome.errors)} failed: {outcome.errors[0]}" if outcome.errors else ""),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    problems = check(outcomes) if args.check else []
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
