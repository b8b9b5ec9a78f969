"""The controller under load, and N agents that join at once: ours beside torch's default rendezvous.

usage: python benchmarks/controller.py [--short] [--parts load,rendezvous] [--nodes 1250] [--seconds 90] [--check]

Load: one controller process, and this process as all agents and workers, each on a TCP connection of its own, each
with one message a second. Measured are the answers to questions (a hundredth of the beats), how soon the peers of dead
nodes know, how soon all are back when the controller was killed, and what it needs of processor and memory.
Rendezvous: `rendezvous_scaling.py` in both libraries up to 256 nodes, ours alone beyond. --short: a tenth of all that.
--check: end with 1 if a figure is worse than its goal. The goals are for 5,000 workers on 2 cores that do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import rendezvous_scaling
from load.fleet import Counts, Fleet, Worker
from load.server import Server

SLOTS = 4
JOBS = 40
START_LIMIT_S = 60.0
STARTS_PER_S = 100
STORM_LIMIT_S = 60.0
# A node that dies: how long until its peers have been told, at most.
DEATH_LIMIT_S = 10.0
FAILURE_S = 0.05
COLUMNS = "rendezvous of N nodes, seconds until all have their places"


@dataclass
class Load:
    """Figures of one run. Seconds, MB of resident memory, and the controller's share of one core."""

    workers: int
    nodes: int
    jobs: int
    start_s: float = 0.0
    messages_per_s: float = 0.0
    answer_p50_s: float = 0.0
    answer_p99_s: float = 0.0
    answer_most_s: float = 0.0
    core_share: float = 0.0
    resident_mb: float = 0.0
    messages: int = 0
    growth_mb: float = 0.0
    # From the controller's judgement to the last peer's cut, and from the death itself; the worst of all deaths.
    told_s: float = 0.0
    death_s: float = 0.0
    deaths: int = 0
    storm_s: float = 0.0
    storm_start_s: float = 0.0
    storm_retries: dict[str, int] = field(default_factory=dict)
    resident_most_mb: float = 0.0
    problems: list[str] = field(default_factory=list)


GOALS = {"answer_p99_s": 0.1, "resident_most_mb": 600.0, "told_s": 0.3, "storm_s": 10.0, "growth_mb": 20.0}


async def until(check: Callable[[], bool], counts: Counts, limit_s: float, what: str) -> float:
    """Wait until it is true; the seconds that it took. Raises TimeoutError, saying what did not come true."""
    started_s = time.monotonic()
    while not check():
        if time.monotonic() - started_s > limit_s:
            raise TimeoutError(f"{what}: not within {limit_s:g} s; {counts}")
        await asyncio.sleep(0.01)
    return time.monotonic() - started_s


async def load(nodes: int, jobs: int, seconds: float, deaths: int, seed: int) -> Load:
    """One fleet's life: start, steady work, deaths, a killed controller, steady work."""
    figures = Load(nodes * SLOTS, nodes, jobs)
    with tempfile.TemporaryDirectory() as directory, Server(Path(directory)) as server:
        fleet = Fleet(server.grpc, nodes=nodes, slots=SLOTS, jobs=jobs, seed=seed)
        beats = asyncio.create_task(fleet.beat())
        try:
            for agent in fleet.agents:
                agent.start()
                # Machines do not boot at the same moment; the storm, later on, is of all at once.
                await asyncio.sleep(1 / STARTS_PER_S)
            figures.start_s = await until(
                lambda: fleet.counts.seated == fleet.workers, fleet.counts, START_LIMIT_S, "all workers in a generation"
            )
            await _steady(fleet, server, seconds, figures)
            await _deaths(fleet, server, deaths, figures)
            await _storm(fleet, server, figures)
            await asyncio.sleep(5.0)
            figures.resident_most_mb = max(figures.resident_most_mb, server.resident_mb(most=True))
            figures.problems = [*fleet.counts.fatal, *fleet.counts.evicted, *_lost(server, fleet)]
        finally:
            beats.cancel()
            fleet.close()
    return figures


async def _steady(fleet: Fleet, server: Server, seconds: float, figures: Load) -> None:
    counts = fleet.counts
    fleet.questions = True
    # What the first seconds allocate is not growth.
    await asyncio.sleep(min(10.0, seconds / 4))
    counts.answers_s.clear()
    sent, started_s, core_s = counts.sent, time.monotonic(), server.core_s()
    resident_mb = server.resident_mb()
    await asyncio.sleep(seconds)
    passed_s = time.monotonic() - started_s
    figures.messages = counts.sent - sent
    figures.messages_per_s = figures.messages / passed_s
    figures.core_share = (server.core_s() - core_s) / passed_s
    figures.resident_mb = server.resident_mb()
    figures.growth_mb = figures.resident_mb - resident_mb
    answers_s = sorted(counts.answers_s)
    figures.answer_p50_s = answers_s[len(answers_s) // 2]
    figures.answer_p99_s = answers_s[int(len(answers_s) * 0.99)]
    figures.answer_most_s = answers_s[-1]


async def _deaths(fleet: Fleet, server: Server, count: int, figures: Load) -> None:
    """Nodes lose power, each in a job of its own; one peer says that its collective failed, the others are told."""
    for job in list(fleet.jobs)[:count]:
        agents = fleet.jobs[job]
        victim = agents.pop()
        peers = [worker for agent in agents for worker in agent.workers]
        for peer in peers:
            peer.cut_at_s = 0.0
        ranks = tuple(worker.rank for worker in victim.workers)
        died_s = time.time()
        victim.kill()
        # As soon as a survivor's collective fails.
        await asyncio.sleep(FAILURE_S)
        peers[0].ask(failed=True, unreachable=ranks)
        told = peers[1:]
        await until(partial(_all_cut, told), fleet.counts, DEATH_LIMIT_S, f"{job}: all peers are told")
        judged_s = await asyncio.to_thread(server.judged_s, job, victim.name)
        last_s = max(peer.cut_at_s for peer in told)
        figures.told_s = max(figures.told_s, last_s - judged_s)
        figures.death_s = max(figures.death_s, last_s - died_s)
        figures.deaths += 1
        await until(partial(_all_seated, peers), fleet.counts, DEATH_LIMIT_S, f"{job}: a new generation")


def _all_cut(workers: list[Worker]) -> bool:
    return all(worker.cut_at_s for worker in workers)


def _all_seated(workers: list[Worker]) -> bool:
    return all(worker.generation for worker in workers)


async def _storm(fleet: Fleet, server: Server, figures: Load) -> None:
    """kill -9 and a new start: all streams break at once, and come back as the library's do."""
    counts = fleet.counts
    streams = sum(1 + len(agent.workers) for agent in fleet.agents)
    figures.resident_most_mb = server.resident_mb(most=True)
    counts.retried.clear()
    await asyncio.to_thread(server.kill)
    killed_s = time.monotonic()
    await asyncio.to_thread(server.start)
    served_s = time.monotonic()
    figures.storm_start_s = served_s - killed_s
    await until(lambda: counts.open == streams, counts, STORM_LIMIT_S, "all streams are back")
    figures.storm_s = time.monotonic() - served_s
    figures.storm_retries = dict(counts.retried)


def _lost(server: Server, fleet: Fleet) -> list[str]:
    """Nodes that the controller calls lost, though nobody killed them."""
    alive = {agent.name for agent in fleet.agents}
    return [
        f"{job}/{node['node_id']} is {node['state']}"
        for job in fleet.jobs
        for node in server.get(f"/api/v1/jobs/{job}")["nodes"]
        if node["node_id"] in alive and node["state"] != "active"
    ]


def show(figures: Load) -> None:
    print(f"{figures.workers} workers in {figures.nodes} nodes of {figures.jobs} jobs")
    print(f"  all in their generations {figures.start_s:.1f} s after the last one started")
    print(
        f"  {figures.messages} messages, {figures.messages_per_s:.0f} a second: answered within "
        f"{figures.answer_p50_s * 1000:.1f} ms (median), {figures.answer_p99_s * 1000:.1f} ms (p99), "
        f"{figures.answer_most_s * 1000:.0f} ms (most)"
    )
    print(
        f"  the controller: {figures.core_share:.2f} of a core, {figures.resident_mb:.0f} MB, "
        f"{figures.growth_mb:+.1f} MB over these messages; at most {figures.resident_most_mb:.0f} MB"
    )
    print(
        f"  {figures.deaths} deaths: the last peer told {figures.told_s * 1000:.0f} ms after the judgement, "
        f"{figures.death_s * 1000:.0f} ms after the death (worst)"
    )
    retries = ", ".join(f"{count} x {reason}" for reason, count in sorted(figures.storm_retries.items()))
    print(
        f"  killed and started again within {figures.storm_start_s:.1f} s: all streams back {figures.storm_s:.1f} s "
        f"after that ({retries})"
    )
    print(
        f"  errors and evictions: {len(figures.problems)}{''.join(f'{chr(10)}    {p}' for p in figures.problems[:5])}"
    )


def rendezvous(both: list[int], ours: list[int]) -> list[rendezvous_scaling.Outcome]:
    """Ours and torch's default, one after the other for each size, and ours alone beyond."""
    outcomes = []
    print(f"{COLUMNS}\n{'N':>5} {'stretto':>9} {'c10d':>9} {'ratio':>7}")
    for nodes in [*both, *ours]:
        taken_s = {}
        for backend in ("stretto", "c10d") if nodes in both else ("stretto",):
            with rendezvous_scaling.SERVER[backend]() as endpoint:
                outcome = rendezvous_scaling.measure(backend, endpoint, nodes, processes=2)
            outcomes.append(outcome)
            taken_s[backend] = outcome.all_s
            for error in outcome.errors[:1]:
                print(f"      {backend}: {len(outcome.errors)} failed: {error}")
        theirs = ""
        if "c10d" in taken_s:
            theirs = f"{taken_s['c10d']:8.2f}s {taken_s['c10d'] / taken_s['stretto']:6.1f}x"
        if taken_s.get("c10d") == math.inf:
            theirs = "   fails"
        print(f"{nodes:5} {taken_s['stretto']:8.2f}s {theirs}", flush=True)
    return outcomes


def check(figures: Load) -> list[str]:
    worse = [f"{name} is {getattr(figures, name):.3g}, the goal {goal}" for name, goal in GOALS.items()]
    return figures.problems + [
        text for text, (name, goal) in zip(worse, GOALS.items(), strict=True) if getattr(figures, name) > goal
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tenth of the fleet, for a quarter of a minute")
    parser.add_argument("--parts", default="load,rendezvous")
    parser.add_argument("--nodes", type=int, help="with four workers each [1250]")
    parser.add_argument("--seconds", type=float, help="of steady work [90]")
    parser.add_argument("--deaths", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    # Ended by SIGTERM, it ends its processes, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    nodes = args.nodes or (125 if args.short else 1250)
    jobs = min(JOBS, max(1, nodes // 4))
    results: dict[str, Any] = {}
    problems: list[str] = []
    if "load" in args.parts:
        figures = asyncio.run(load(nodes, jobs, args.seconds or (15.0 if args.short else 90.0), args.deaths, args.seed))
        show(figures)
        results["load"] = asdict(figures)
        problems += check(figures)
    if "rendezvous" in args.parts:
        both, ours = ([8, 32], [128]) if args.short else ([8, 16, 32, 64, 128, 256], [512, 1000, 2000])
        outcomes = rendezvous(both, ours)
        results["rendezvous"] = [asdict(outcome) for outcome in outcomes]
        problems += [f"{o.nodes} nodes: {o.errors[0]}" for o in outcomes if o.errors and o.backend == "stretto"]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    for problem in problems if args.check else ():
        print(problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
