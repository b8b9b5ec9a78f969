"""`stretto simulate`: the shipped trace, the comparison that it is for, and traces that are none."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from harness.controller import STRETTO
from harness.terminal import Terminal
from stretto_controller.core.goodput.autoscale import Autoscale, AutoscaleMode
from stretto_controller.simulate.policies import EqualShares, Fixed, Goodput, Policy
from stretto_controller.simulate.run import Outcome, Simulation, best_s
from stretto_controller.simulate.trace import Capacity, Failure, Trace, TracedJob, read_trace

SHIPPED = Path(__file__).parents[2] / "examples/traces/fleet-160.yaml"
AUTOSCALE = Autoscale(mode=AutoscaleMode.ACT, efficiency_floor=0.3)


def job(name: str = "a", **fields: object) -> TracedJob:
    values: dict[str, object] = {
        "name": name, "arrives_s": 0.0, "overhead_s": 0.02, "sample_s": 0.0025, "exchange_s": 0.01, "hop_s": 0.001,
        "base_batch_size": 32, "batch_size": 32, "noise_begin": 5.0, "noise_end": 50.0, "target_tau": 20_000.0,
        "fixed_nodes": 2,
    }  # fmt: skip
    return TracedJob(**{**values, **fields})  # type: ignore[arg-type]  # a test's shorthand


def played(trace: Trace, policy: Policy, *, shuffled: bool = False, seed: int = 1) -> Outcome:
    return Simulation(trace, policy, review_s=120.0, seed=seed, shuffled=shuffled).run()


@pytest.fixture(scope="module")
def quarter() -> Trace:
    """Every fourth job of the shipped trace on a quarter of its nodes: as crowded, and played sooner."""
    trace = read_trace(SHIPPED)
    return replace(trace, nodes=16, jobs=trace.jobs[::4], capacity=(), failures=())


def test_the_shipped_trace_has_160_jobs_on_64_nodes() -> None:
    trace = read_trace(SHIPPED)
    assert (len(trace.jobs), trace.nodes) == (160, 64)
    assert trace.capacity
    assert trace.failures


def test_goodput_beats_fixed_sizes_and_throughput_and_by_what_it_knows_of_the_gain(quarter: Trace) -> None:
    fixed = played(quarter, Fixed())
    throughput = played(quarter, Goodput("throughput only", by_gain=False, autoscale=AUTOSCALE))
    goodput = played(quarter, Goodput(autoscale=AUTOSCALE))
    shuffled = played(quarter, Goodput(autoscale=AUTOSCALE), shuffled=True)
    for other in (fixed, throughput, shuffled):
        print(f"{goodput.mean_completion_s / other.mean_completion_s - 1:+.0%}, {other.efficiency:.0%}")
        assert goodput.mean_completion_s < other.mean_completion_s
        assert goodput.efficiency > other.efficiency
        assert goodput.fairness > other.fairness


def test_the_same_seed_plays_the_same(quarter: Trace) -> None:
    some = replace(quarter, jobs=quarter.jobs[:10])
    assert played(some, Goodput(), seed=3) == played(some, Goodput(), seed=3)


@pytest.mark.parametrize("policy", [Fixed(), EqualShares(), Goodput()], ids=lambda policy: policy.name)
def test_jobs_outlive_nodes_that_vanish_and_break(policy: Policy) -> None:
    jobs = tuple(job(f"job-{i}", arrives_s=60.0 * i) for i in range(6))
    trace = Trace(
        8, jobs, (Capacity(600.0, 2), Capacity(3600.0, 8)), (Failure(300.0, 0, 600.0), Failure(900.0, 1, 60.0))
    )
    calm = Trace(8, jobs)
    assert played(trace, policy).mean_completion_s > played(calm, policy).mean_completion_s


def test_a_job_alone_takes_what_its_step_times_and_gains_say() -> None:
    alone = job(max_nodes=1, fixed_nodes=1, target_tau=7200.0)
    outcome = played(Trace(4, (alone,)), Fixed())
    assert outcome.completion_s[0] == pytest.approx(7200 * 0.1, rel=1e-6)
    assert best_s(alone) == pytest.approx(720.0)
    assert outcome.efficiency == pytest.approx(1.0)


def test_a_heavier_job_and_a_higher_priority_are_done_sooner() -> None:
    jobs = [job(f"job-{i}", target_tau=50_000.0) for i in range(4)]
    trace = Trace(12, (replace(jobs[0], weight=4.0), *jobs[1:]))
    outcome = played(trace, Goodput(autoscale=AUTOSCALE))
    assert outcome.completion_s[0] == min(outcome.completion_s), outcome.completion_s
    trace = Trace(2, (*jobs[:3], replace(jobs[3], priority=1)))
    assert played(trace, Goodput()).completion_s[3] == min(played(trace, Goodput()).completion_s)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it must be a table"),
        ("nodes: 4\njobs: []", "at least one of each"),
        ("nodes: 4\njobs: [{name: a}]", "lacks arrives_s"),
        ("nodes: 4\njobs: [1]", "must be a table"),
        ("nodes: many\njobs: [{name: a}]", "lacks"),
        ("nodes: 4\nnode: 5\njobs: [{name: a}]", "unknown entries node"),
        ("nodes: [", "cannot read the trace"),
    ],
)
def test_what_is_no_trace_is_said_to_be_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trace(path)


SMALL = "nodes: 4\njobs:\n" + "".join(
    f"  - {{name: job-{i}, arrives_s: {300 * i}, overhead_s: 0.02, sample_s: 0.0025, exchange_s: 0.01, hop_s: 0.001, "
    "base_batch_size: 32, batch_size: 32, noise_begin: 5, noise_end: 50, target_tau: 20000, fixed_nodes: 2}\n"
    for i in range(4)
)


@pytest.mark.e2e
def test_the_command_compares_at_80_columns_and_draws(tmp_path: Path) -> None:
    trace, plot = tmp_path / "trace.yaml", tmp_path / "plot.png"
    trace.write_text(SMALL)
    terminal = Terminal(STRETTO, "simulate", str(trace), "-o", str(plot))
    try:
        assert terminal.exit_code() == 0
        for part in ("4 jobs on 4 nodes", "fixed sizes", "equal shares", "throughput only", "goodput", "shuffled"):
            assert part in terminal.text, terminal.text
    finally:
        terminal.close()
    assert plot.read_bytes().startswith(b"\x89PNG")
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run([STRETTO, "simulate", str(trace), "--json"], capture_output=True, text=True, env=environment)
    policies = [outcome["policy"] for outcome in json.loads(done.stdout)]
    assert policies == ["fixed sizes", "equal shares", "throughput only", "goodput", "goodput, moments shuffled"]
    refused = subprocess.run([STRETTO, "simulate", str(tmp_path / "none.yaml")], capture_output=True, text=True)
    assert (refused.returncode, "cannot read the trace" in refused.stderr) == (2, True)
