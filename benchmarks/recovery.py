"""How long training stands still when nodes and workers die, hang, come and go: torchrun's rendezvous and ours.

usage: python benchmarks/recovery.py [--setups c10d,tuned,torchrun,run] [--scenarios node,worker,...] [--repetitions 5]
       python benchmarks/recovery.py --storm 100 [--seed 1]

Three nodes of one worker each train a small DDP model on this machine; one is disturbed, and the workers' own logs
(one clock) say when each completed its next step. torchrun's script begins anew in new processes and loads no
checkpoint; ours lives on. A pause is the longest gap between two steps, less a usual step. "Never" is what took longer
than --limit seconds. --check fails where one of our medians misses its goal. --storm puts one job of ours through so
many random disturbances instead.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from outages.cluster import SETUPS
from outages.link import bytes_per_s
from outages.scenarios import FIGURES, LARGE, SCENARIOS, Findings, measure
from outages.storm import Aftermath, Event, run_storm

WIDTH = 24
LARGE_JOIN_GOAL_S = 0.5
STORM_GOAL_S = 0.3


def shown(values: list[float], unit: str) -> str:
    """The median, and the worst in brackets."""
    if not values:
        return "-"
    middle = statistics.median(values)
    if math.isinf(middle):
        return f"never (of {len(values)})"
    worst = "never" if math.isinf(max(values)) else f"{max(values):.3g}"
    return f"{middle:.3g}{unit and ' ' + unit} ({worst})"


def print_table(found: dict[str, Findings], goals: dict[str, float]) -> None:
    """One line per figure, one column per setup; last, how many times longer torchrun takes."""
    columns = [SETUPS[name].name for name in found]
    ratio = [name for name in found if not SETUPS[name].ours][-1:] + [name for name in found if SETUPS[name].ours][-1:]
    with_ratio = len({SETUPS[name].ours for name in ratio}) == 2
    print(f"{'median (worst)':50}" + "".join(f"{name:>{WIDTH}}" for name in columns) + f"{'ratio':>8}{'goal':>8}")
    for key, figure in FIGURES.items():
        values = {name: findings.values.get(key, []) for name, findings in found.items()}
        if not any(values.values()):
            continue
        line = "".join(f"{shown(values[name], figure.unit):>{WIDTH}}" for name in found)
        times = ""
        if with_ratio and all(values[name] for name in ratio) and figure.unit:
            theirs, ours = (statistics.median(values[name]) for name in ratio)
            times = f"{theirs / ours:.0f}x" if ours > 0 and math.isfinite(theirs) else ""
        goal = f"{goals[key]:.2g}{figure.unit}" if key in goals else ""
        print(f"{figure.title:50}{line}{times:>8}{goal:>8}")


def print_details(name: str, findings: Findings) -> None:
    """Where the time went, and what the loop's own sleep had to do with it."""
    print(f"\n{SETUPS[name].name}:")
    for figure, stages in findings.stages.items():
        parts = ", ".join(f"{stage} {1000 * statistics.median(values):.1f}" for stage, values in stages.items())
        print(f"  {figure}: ms by stage, medians: {parts}")
    for figure, steps_s in findings.usual_step_s.items():
        print(f"  {figure}: a usual step took {1000 * statistics.median(steps_s):.1f} ms")
    late = [seconds for seconds in findings.paced_s if seconds > 0]
    if late:
        print(
            f"  {len(late)} of {len(findings.paced_s)} next steps were asked for after the event, as the loop slept: "
            f"{1000 * statistics.median(late):.1f} ms later at the median, {1000 * max(late):.1f} at worst"
        )
    for failure in findings.failures:
        print(f"  {failure}")


def compare(args: argparse.Namespace) -> int:
    """All scenarios for all setups; 1 if --check and a goal was missed."""
    found = measure_all(args)
    goals = {key: figure.goal for key, figure in FIGURES.items() if figure.goal is not None}
    state_bytes = max(findings.state_bytes for findings in found.values())
    if "large" in args.scenarios.split(",") and state_bytes:
        speed = bytes_per_s()
        goals["large join"] = LARGE_JOIN_GOAL_S + state_bytes / speed
        print(f"{state_bytes / 1e6:.0f} MB of state; the loopback moves {speed / 1e9:.2f} GB/s")
    print_table(found, goals)
    for name, findings in found.items():
        print_details(name, findings)
    if args.json:
        args.json.write_text(json.dumps({name: findings.values for name, findings in found.items()}, indent=1))
    problems = missed(found, goals)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems and args.check else 0


def measure_all(args: argparse.Namespace) -> dict[str, Findings]:
    """What each setup's repetitions gave, by the setup's name."""
    scenarios = args.scenarios.split(",")
    small = [scenario for scenario in SCENARIOS if scenario in scenarios]
    found: dict[str, Findings] = {}
    for name in args.setups.split(","):
        setup = SETUPS[name]
        repetitions = args.repetitions if setup.ours else args.peer_repetitions
        options = {"repetitions": repetitions, "limit_s": args.limit, "seed": args.seed, "pace_s": args.pace}
        found[name] = Findings()
        measure(setup, small, found[name], **options)
        if "large" in scenarios:
            measure(setup, list(LARGE), found[name], large=True, **options)
    return found


def missed(found: dict[str, Findings], goals: dict[str, float]) -> list[str]:
    """Our medians that are above their goals."""
    return [
        f"{SETUPS[name].name}: {FIGURES[key].title}: {statistics.median(findings.values[key]):.3g}, goal {goal:.3g}"
        for name, findings in found.items()
        for key, goal in goals.items()
        if SETUPS[name].ours and findings.values[key] and statistics.median(findings.values[key]) > goal
    ]


def tell(number: int, event: Event) -> None:
    print(f"{number:4} {event.kind:20} {1000 * event.lost_s:9.1f} ms lost", flush=True)


def storm(args: argparse.Namespace) -> int:
    """One job, many events; 1 if it did not live through them, or --check and the goal was missed."""
    aftermath = run_storm(SETUPS["run"], args.storm, limit_s=args.limit, seed=args.seed, pace_s=args.pace, told=tell)
    print_storm(aftermath)
    if args.json:
        args.json.write_text(json.dumps(asdict(aftermath), indent=1))
    if aftermath.failure:
        print(aftermath.failure, file=sys.stderr)
    lost_s = [event.lost_s for event in aftermath.events]
    missed = args.check and not (lost_s and statistics.median(lost_s) < STORM_GOAL_S)
    return 1 if missed or aftermath.failure or not aftermath.exactly_once else 0


def print_storm(aftermath: Aftermath) -> None:
    """Time lost by kind, and what became of steps and samples."""
    print(f"\n{'time lost per event':20}{'events':>8}{'median':>12}{'p90':>12}{'worst':>12}")
    for kind in [*sorted({event.kind for event in aftermath.events}), "all"]:
        lost_s = sorted(event.lost_s for event in aftermath.events if kind in ("all", event.kind))
        if lost_s:
            p90_s = lost_s[math.ceil(0.9 * len(lost_s)) - 1]
            figures = "".join(f"{1000 * value:>9.1f} ms" for value in (statistics.median(lost_s), p90_s, lost_s[-1]))
            print(f"{kind:20}{len(lost_s):>8}{figures}")
    print(
        f"{aftermath.steps} steps in {aftermath.wall_s:.0f} s, {100 * aftermath.useful_share:.1f} % of the time in "
        f"useful steps; {aftermath.steps_repeated} steps were done in two generations; each sample of each finished "
        f"epoch was used {'exactly once' if aftermath.exactly_once else 'NOT exactly once'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--scenarios", default=",".join([*SCENARIOS, "large"]))
    parser.add_argument("--repetitions", type=int, default=5, help="of ours")
    parser.add_argument("--peer-repetitions", type=int, default=1)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds until a recovery counts as never")
    parser.add_argument("--pace", type=float, default=0.01, help="seconds that the loop sleeps after each step")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--storm", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for option, given, allowed in (
        ("--setups", args.setups, [*SETUPS]),
        ("--scenarios", args.scenarios, [*SCENARIOS, "large"]),
    ):
        if unknown := set(given.split(",")) - set(allowed):
            parser.error(f"{option} has {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was started ends first
    print(f"seed {args.seed}", flush=True)
    return storm(args) if args.storm else compare(args)


if __name__ == "__main__":
    sys.exit(main())
