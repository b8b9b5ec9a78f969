"""Live workers under random events for STRETTO_SOAK_S seconds (60 events at most); STRETTO_SEED replays a schedule."""

from __future__ import annotations

import os
import re
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.live_job import LiveJob
from harness.network import Network
from soak.live_chaos import CONTROLLER, MAX_NODES, LiveChaos

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("STRETTO_SOAK_S", "600"))
EVENTS = 60
# A fixed global batch that eight workers share, or one does in four parts; an epoch's last batch is short.
OPTIONS: dict[str, Any] = {"global_batch_size": 24, "batch_size": 6, "samples": 101, "pace_s": 0.03, "num_workers": 1}


def test_live_workers_survive_random_events(tmp_path: Path) -> None:
    seed = int(os.environ.get("STRETTO_SEED") or time.time_ns() % 1_000_000)
    print(f"seed {seed} (STRETTO_SEED)", flush=True)
    objection = Network.objection()
    if objection is not None:
        print(f"without partitions: {objection}")
    with ExitStack() as stack:
        network = stack.enter_context(Network(CONTROLLER)) if objection is None else None
        controller = stack.enter_context(_controller(tmp_path, network))
        agents = stack.enter_context(
            Agents(tmp_path / "agents", controller.grpc, nnodes=f"1:{MAX_NODES}", named=True, network=network)
        )
        chaos = LiveChaos(seed, LiveJob(tmp_path, controller, agents, **OPTIONS), network)
        while len(chaos.slots) < MAX_NODES:
            chaos.join()
        chaos.settle()
        end_s = time.monotonic() + SOAK_S
        while time.monotonic() < end_s and len(chaos.story) < EVENTS:
            happened = chaos.once()
            print(
                f"{len(chaos.story):3} {happened.name:25} no step for {happened.gap_s:6.2f} s, "
                f"all train after {happened.whole_s:6.2f} s: {len(chaos.members)} of {len(chaos.slots)} nodes",
                flush=True,
            )
            time.sleep(chaos.rng.uniform(0.0, 1.0))
        _end(chaos)
        _check_outputs(agents, controller)
    gap_s = statistics.median(happened.gap_s for happened in chaos.story)
    print(f"{len(chaos.story)} events, no step for {gap_s:.3f} s (median)")


def _controller(directory: Path, network: Network | None) -> ControllerProcess:
    if network is None:
        return ControllerProcess(directory)
    on_its_host = {"STRETTO_HOST": network.address(CONTROLLER), "STRETTO_INSECURE": "yes"}
    return ControllerProcess(directory, network.command(CONTROLLER), **on_its_host)


def _end(chaos: LiveChaos) -> None:
    """The target is reached: all agents end well, nothing is left behind, and the evidence is in order."""
    job, agents = chaos.job, chaos.agents
    last = job.finish()
    for name in chaos.slots:
        assert agents.exit_code(name) == 0, chaos.words(f"{name} did not end well")
    assert job.step() == last, f"the last step was {job.step()}, not {last}"
    job.until(lambda: not agents.left_over(), f"processes are left: {agents.left_over()}")
    assert job.check_samples() == last
    assert len(job.losses()) == last
    print(f"{last} steps; equal on all ranks at {job.check_states()} points in time")


def _check_outputs(agents: Agents, controller: ControllerProcess) -> None:
    """Nobody has failed but those who were told to."""
    for path in agents.directory.glob("*.out"):
        output = path.read_text(errors="replace")
        assert "stuck in" not in output, f"a watchdog fired:\n{output}"
        assert "hold different states" not in output, output
        # The last line of each traceback says what was raised; one of a process that was killed meanwhile has none.
        _, *tracebacks = output.split("Traceback (most recent call last):\n")
        raised = [re.search(r"^[A-Za-z_][\w.]*(: .*)?$", text, re.MULTILINE) for text in tracebacks]
        ends = [found[0] for found in raised if found]
        unknown = [end for end in ends if not ("injected at" in end or "SignalException" in end)]
        assert not unknown, f"{path.name}: {unknown}\n{output}"
    assert "Traceback" not in controller.log, controller.log
