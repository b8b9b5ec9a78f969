"""What it costs to be watched: a scrape of 200 jobs, the page's first paint, and live pages.

    .venv/bin/python benchmarks/monitoring.py [--browsers 100] [--seconds 15]

A real controller in a process of its own, whose database was filled beforehand; Debian's Chromium paints. Prints one
JSON object, then each limit with PASS or what it is short of; ends with 1 if it is short of any.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness.browser import chromium
from harness.controller import ControllerProcess
from stretto_controller.core.model import JobSpec, Mode, Phase, Record
from stretto_controller.curve import Point
from stretto_controller.store.contents import Marks, Save, StoredEvent
from stretto_controller.store.sqlite import SqliteStore

POINTS = 10_000
SPEC = JobSpec(min_nodes=1, max_nodes=4, mode=Mode.IN_PROCESS, base_batch_size=8, batch_size=8, target_tau=1e5)


async def fill(data_dir: Path, jobs: int) -> None:
    """A database of waiting jobs; the first has a long curve."""
    store = SqliteStore(data_dir, kept_events=1000, kept_generations=1000)
    begun_s = time.time() - POINTS
    curve = tuple(
        Point(begun_s + n, 1 + n // 500, n, 1.5 * n, 1.5 + math.sin(n / 99) / 4, 2.0, 3 / (1 + n), 0.15, 0.1, 1.5)
        for n in range(POINTS)
    )
    for number in range(jobs):
        name = f"job-{number:03}"
        record = Record(name, SPEC, Phase.PENDING, "0 of at least 1 nodes are there")
        events = tuple(
            StoredEvent(1 + number * 100 + n, begun_s + n, "node_joined", f"host-{n} joined") for n in range(100)
        )
        await store.save(Save(name, record, Marks(), events, points=() if number else curve))
    await store.close()


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def scrape_ms(controller: ControllerProcess, times: int = 20) -> dict[str, float]:
    """CPU of the controller per scrape, and how long the scraper waits."""
    request = urllib.request.Request(
        f"{controller.http}/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
    )
    waits, before_s = list[float](), cpu_s(controller.pid)
    for _ in range(times):
        begun_s = time.monotonic()
        with urllib.request.urlopen(request) as response:
            size = len(response.read())
        waits.append(1000 * (time.monotonic() - begun_s))
    used_ms = 1000 * (cpu_s(controller.pid) - before_s) / times
    return {"cpu_ms": used_ms, "median_ms": statistics.median(waits), "max_ms": max(waits), "bytes": size}


def first_paint_ms(controller: ControllerProcess, path: str, ready: str, times: int = 5) -> dict[str, float]:
    """Chromium's own first contentful paint, and when what was asked for is there; each in a fresh page."""
    paints, whole = list[float](), list[float]()
    with chromium() as browser:
        for _ in range(times):
            page = browser.new_page()
            page.goto(f"{controller.http}{path}")
            page.locator(ready).first.wait_for()
            whole.append(page.evaluate("performance.now()"))
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            page.close()
    return {"first_paint_ms": statistics.median(paints), "whole_ms": statistics.median(whole), "worst_ms": max(whole)}


def watching(controller: ControllerProcess, pages: int, seconds: float) -> dict[str, float]:
    """The controller's share of a core while so many pages look at one job, beyond what it takes unwatched."""

    def used(duration_s: float) -> float:
        begun_s, before_s = time.monotonic(), cpu_s(controller.pid)
        time.sleep(duration_s)
        return (cpu_s(controller.pid) - before_s) / (time.monotonic() - begun_s)

    idle = used(seconds / 3)
    ends, heard = threading.Event(), [0] * pages
    threads = [threading.Thread(target=_listen, args=(controller.http, ends, heard, n)) for n in range(pages)]
    for thread in threads:
        thread.start()
    while not all(heard):
        time.sleep(0.1)
    before = sum(heard)
    share = used(seconds)
    frames = (sum(heard) - before) / seconds
    ends.set()
    for thread in threads:
        thread.join()
    return {"idle_share": idle, "share_of_a_core": share, "frames_per_s": frames}


def _listen(url: str, ends: threading.Event, heard: list[int], number: int) -> None:
    request = urllib.request.Request(f"{url}/api/v1/watch?job=job-001")
    with urllib.request.urlopen(request, timeout=30) as stream:
        for line in stream:
            heard[number] += line.startswith(b"event:")
            if ends.is_set():
                return


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--browsers", type=int, default=100)
    options.add_argument("--seconds", type=float, default=15.0)
    arguments = options.parse_args()
    results: dict[str, Any] = {}
    pages = f"{arguments.browsers} pages on one job"
    with tempfile.TemporaryDirectory() as folder:
        for jobs in (200, 50):
            directory = Path(folder, str(jobs))
            directory.mkdir()
            asyncio.run(fill(directory / "data", jobs))
            with ControllerProcess(directory, STRETTO_SERVICE_KEPT_POINTS=str(2 * POINTS)) as controller:
                if jobs == 200:
                    results["scrape of 200 jobs"] = scrape_ms(controller)
                    continue
                listed = "li.job:nth-child(50)"
                results["list of 50 jobs"] = first_paint_ms(controller, "/", listed)
                drawn = "figure[data-chart=tau] .values:has-text('tau 14,999')"
                results["job with 10,000 points"] = first_paint_ms(controller, "/#/job/job-000", drawn)
                results[pages] = watching(controller, arguments.browsers, arguments.seconds)
    results["load average"] = os.getloadavg()[0]
    print(json.dumps(results, indent=1))
    met = [
        verdict("scrape of 200 jobs, until it is answered", results["scrape of 200 jobs"]["median_ms"], 50, "ms"),
        verdict("first paint, 50 jobs", results["list of 50 jobs"]["first_paint_ms"], 500, "ms"),
        verdict("first paint, 10,000 points", results["job with 10,000 points"]["first_paint_ms"], 500, "ms"),
        verdict(pages, 100 * results[pages]["share_of_a_core"], 10, "% of a core"),
    ]
    raise SystemExit(0 if all(met) else 1)


def verdict(what: str, measured: float, limit: float, unit: str) -> bool:
    good = measured < limit
    print(f"{'PASS' if good else 'SHORT'}  {what}: {measured:.3g} {unit}, limit {limit} {unit}")
    return good


if __name__ == "__main__":
    main()
