"""A Jepsen-style run: three controllers on three etcds, four nodes of live workers, people who ask, many faults.

They come every few seconds for half of STRETTO_SOAK_S, five minutes at most; STRETTO_SEED draws the same ones again.
What must hold: one history of generations, without forks; each acknowledged request kept, once; each sample used once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from harness.agents import Agents
from harness.controller import ControllerProcess
from harness.etcd import EtcdCluster
from harness.live_job import LiveJob
from harness.network import Network
from soak.cluster_chaos import CONTROLLERS, MEMBERS, NODES, PEOPLE, ClusterChaos, leads_after_s
from soak.people import MOST_NODES, REGISTER, TRAINING

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

# Half of it: what begins and ends the run takes a while, too.
SOAK_S = min(300.0, 0.5 * float(os.environ.get("STRETTO_SOAK_S", "600")))
# For all to train again once everything has healed, on a machine that has other work.
PATIENCE_S = 150.0
OPTIONS: dict[str, Any] = {"global_batch_size": 24, "batch_size": 6, "samples": 101, "pace_s": 0.05, "num_workers": 0}
# Of the leader's host, asks over gRPC what the checks need to know.
_READ = """
import json, sys
from google.protobuf.json_format import MessageToDict as plain
from stretto.client import JobsClient
with JobsClient(sys.argv[1]) as client:
    jobs = client.list()
    found = {"jobs": {job.name: job.desired_nodes for job in jobs}}
    found["events"] = {job.name: [[e.sequence, e.kind, e.reason] for e in client.events(job.name)] for job in jobs}
    found["generations"] = [plain(g.generation) for g in client.generations(sys.argv[2])]
print(json.dumps(found))
"""


def test_several_controllers_keep_their_word_through_random_faults(tmp_path: Path) -> None:
    seed = int(os.environ.get("STRETTO_SEED") or time.time_ns() % 1_000_000)
    print(f"seed {seed} (STRETTO_SEED)", flush=True)
    objection = Network.objection()
    if objection is not None:
        print(f"without cuts of the network: {objection}")
    with ExitStack() as stack:
        network = None
        if objection is None:
            network = stack.enter_context(Network(*CONTROLLERS, *MEMBERS, *NODES, PEOPLE))
        etcd = stack.enter_context(EtcdCluster(tmp_path / "etcd", len(MEMBERS), network=network))
        controllers = [stack.enter_context(_controller(tmp_path, name, etcd, network)) for name in CONTROLLERS]
        endpoints = ",".join(controller.grpc for controller in controllers)
        agents = stack.enter_context(
            Agents(tmp_path / "agents", endpoints, nnodes=f"1:{len(NODES)}", named=True, network=network)
        )
        job = LiveJob(tmp_path, controllers[0], agents, **OPTIONS)
        chaos = ClusterChaos(seed, controllers, etcd, job, network)
        for name in NODES:
            job.start(name)
        _await(lambda: _training(agents) == set(NODES), lambda: agents.story("not all nodes train"))
        people = _people(tmp_path, endpoints, network)
        stack.callback(people.kill)
        _break_things(chaos)
        assert people.poll() is None, "people met an error"
        people.communicate(b"end\n", timeout=PATIENCE_S)
        assert people.returncode == 0, "people met an error"
        mark_s = time.time()
        _await(
            lambda: _training(agents, since_s=mark_s) == set(NODES),
            lambda: agents.story(f"not all nodes train after the faults\n{_views(controllers)}"),
        )
        host = [] if network is None else network.command(PEOPLE)
        read = subprocess.run(
            [*host, sys.executable, "-c", _READ, endpoints, TRAINING], stdout=subprocess.PIPE, check=True
        )
        found = json.loads(read.stdout)
        last = job.finish()
        for name in NODES:
            assert agents.exit_code(name) == 0, agents.story(f"{name} did not end well")
        journal = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
        _check_requests(journal, found)
        _check_history(found["generations"], agents)
        assert job.check_samples() == last
        for controller in controllers:
            assert "Traceback" not in controller.log, controller.log
        _tell(chaos, journal, found, job.check_states(), last)


def _controller(directory: Path, name: str, etcd: EtcdCluster, network: Network | None) -> ControllerProcess:
    environment = {
        "STRETTO_STORE": "etcd",
        "STRETTO_ETCD_ENDPOINTS": etcd.endpoints,
        "STRETTO_SERVICE_STOP_GRACE_S": "0.2",
    }
    host: list[str] = []
    if network is not None:
        host = network.command(name)
        environment |= {"STRETTO_HOST": network.address(name), "STRETTO_INSECURE": "yes"}
    (directory / name).mkdir()
    return ControllerProcess(directory / name, host, **environment)


def _people(directory: Path, endpoints: str, network: Network | None) -> subprocess.Popen[bytes]:
    host = [] if network is None else network.command(PEOPLE)
    script = Path(__file__).with_name("people.py")
    return subprocess.Popen(
        [*host, sys.executable, str(script), endpoints, str(directory / "journal")], stdin=subprocess.PIPE
    )


def _break_things(chaos: ClusterChaos) -> None:
    end_s = time.monotonic() + SOAK_S
    next_s = time.monotonic()
    while time.monotonic() < end_s:
        chaos.heal_what_is_due()
        if time.monotonic() >= next_s:
            name = chaos.once()
            print(f"{SOAK_S - (end_s - time.monotonic()):6.1f} s  {name or '-'}", flush=True)
            next_s = time.monotonic() + chaos.rng.uniform(2.0, 5.0)
        time.sleep(0.05)
    chaos.heal()


def _training(agents: Agents, since_s: float = 0.0) -> set[str]:
    """The nodes that have made a step, since then, in the newest generation."""
    rows = agents.rows()
    newest = max((row.generation for row in rows), default=0)
    return {row.node for row in rows if row.generation == newest and row.time_s > since_s}


def _await(condition: Callable[[], bool], story: Callable[[], str]) -> None:
    limit_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit_s, story()
        time.sleep(0.05)


def _views(controllers: list[ControllerProcess]) -> str:
    """What each controller knows of the job, for a failure."""
    views = []
    for controller in controllers:
        for what in (("show", "job"), ("events", "job")):
            with suppress(Exception):
                found = controller.ask(*what)
                views.append(f"{controller.grpc}: {json.dumps(found[-40:] if isinstance(found, list) else found)}")
    return "\n".join(views)


def _check_requests(journal: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """What was acknowledged is there, in order, and once."""
    asked = [(entry["what"], entry["nodes"]) for entry in journal if entry["job"] == REGISTER]
    events = [(kind, reason) for _, kind, reason in found["events"][REGISTER]]
    scaled = [(int(reason.split()[0]), int(reason.split()[-1])) for kind, reason in events if kind == "scale_requested"]
    wanted = [nodes for what, nodes in asked if what == "scale"]
    assert [nodes for nodes, _ in scaled] == wanted[-len(scaled) :]
    assert [before for _, before in scaled] == [MOST_NODES, *wanted][-len(scaled) - 1 : -1]
    assert found["jobs"][REGISTER] == wanted[-1]
    pauses = [kind.removesuffix("_requested") for kind, _ in events if kind in ("pause_requested", "resume_requested")]
    assert pauses == [what for what, _ in asked if what in ("pause", "resume")][-len(pauses) :]
    created = {entry["job"] for entry in journal if entry["what"] == "create"}
    deleted = {entry["job"] for entry in journal if entry["what"] == "delete"}
    assert found["jobs"].keys() - {TRAINING} == created - deleted
    sequences = sorted(sequence for events in found["events"].values() for sequence, _, _ in events)
    assert len(sequences) == len(set(sequences)), "a number was given to two events"


def _check_history(generations: list[dict[str, Any]], agents: Agents) -> None:
    """One history: every step that a worker made belongs to a generation of it, as it was agreed."""
    numbers = [int(generation["number"]) for generation in generations]
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    members = {int(g["number"]): {m["nodeId"] for m in g["members"]} for g in generations}
    for row in agents.rows():
        assert row.node in members[row.generation], f"{row} is not of {members[row.generation]}"
        assert row.world_size == len(members[row.generation]), f"{row} is not of {members[row.generation]}"


def _tell(chaos: ClusterChaos, journal: list[dict[str, Any]], found: dict[str, Any], states: int, steps: int) -> None:
    waits_s = sorted(entry["took_s"] for entry in journal)
    repeated = sum(entry["attempts"] > 1 for entry in journal)
    shown = len(found["generations"])
    print(f"{chaos.counts.total()} faults: {dict(chaos.counts)}")
    print(
        f"{len(journal)} requests acknowledged ({repeated} repeated), median {statistics.median(waits_s):.3f} s,"
        f" longest {waits_s[-1]:.1f} s; {shown} generations, {steps} steps, {states} states compared"
    )
    led_s = leads_after_s(chaos.leaders_lost_s, chaos.controllers)
    if led_s:
        print(
            f"a leader was taken away {len(chaos.leaders_lost_s)} times; {len(led_s)} times another led, "
            f"after {statistics.median(led_s):.1f} s (median), {max(led_s):.1f} s at most"
        )
