"""Predicted against measured d(tau)/dt of the demonstration's training, at 1, 2 and 4 workers.

    python benchmarks/goodput.py [--seconds 20]

Real processes: a controller and four agents that run the demo's CNN. At each size the job trains for a while; then the
controller's predictions, made from that size and the smaller ones, are compared with what the next size turns out to
do. Each step is paced to 0.1 s, as in the demo: on two cores four workers would only share them, which no model of
four machines should predict. --pace 0 shows that, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stretto.channel import DEFAULT_ENDPOINT
from stretto.client import JobsClient
from stretto.demo import workload
from stretto.embedded import EmbeddedController
from stretto_proto.v1 import jobs_pb2
from stretto_proto.v1 import types_pb2 as types

JOB, SIZES = "goodput", (1, 2, 4)
LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each size is measured")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds that a step takes at least")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, EmbeddedController(Path(name) / "controller") as controller:
        directory = Path(name)
        (directory / "pace").write_text(str(arguments.pace))
        workload.unpack_images(directory / "images.npz")
        with JobsClient(controller.endpoint or DEFAULT_ENDPOINT) as client:
            spec = types.JobSpec(min_nodes=1, max_nodes=max(SIZES), mode=types.RECONFIGURE_MODE_IN_PROCESS)
            client.create(JOB, spec, desired_nodes=1)
            agents = [_agent(controller.endpoint, directory, n) for n in range(max(SIZES))]
            try:
                _report(client, arguments.seconds)
            finally:
                for agent in agents:
                    agent.kill()
                for agent in agents:
                    agent.wait()


def _agent(endpoint: str, directory: Path, number: int) -> subprocess.Popen[bytes]:
    script = Path(workload.__file__).with_name("train.py")
    command = [
        *(sys.executable, "-c", "from stretto.cli import main; main()", "run", "--endpoint", endpoint, "--job", JOB),
        *("--nnodes", f"1:{max(SIZES)}", "--nproc-per-node", "1", "--max-restarts", "9", "--local-addr", "127.0.0.1"),
        *(str(script), "--checkpoint", str(directory / "checkpoints"), "--result", str(directory / "result.json")),
        *("--images", str(directory / "images.npz"), "--pace", str(directory / "pace")),
    ]
    with (directory / f"agent-{number}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _report(client: JobsClient, seconds: float) -> None:
    predicted: dict[int, types.SizePrediction] = {}
    print(f"{'workers':>7} {'measured':>10} {'predicted before':>17} {'error':>7} {'predicted after':>16} {'error':>7}")
    for nodes in SIZES:
        if nodes > 1:
            client.scale(JOB, nodes)
        first = _running(client, nodes)
        began_s = time.monotonic()
        time.sleep(seconds)
        last = client.get(JOB)
        measured = (last.progress.tau - first.progress.tau) / (time.monotonic() - began_s)
        after = {size.nodes: size for size in last.recommendation.sizes}
        print(
            f"{nodes:7} {measured:8.2f}/s {_cell(predicted, nodes, measured):>25} {_cell(after, nodes, measured):>24}"
        )
        predicted = after
    print(f"\n{client.get(JOB).recommendation.reason}")


def _cell(predictions: dict[int, types.SizePrediction], nodes: int, measured: float) -> str:
    if nodes not in predictions:
        return "-       -"
    rate = predictions[nodes].progress_rate
    return f"{rate:.2f}/s {rate / measured - 1:+7.0%}"


def _running(client: JobsClient, nodes: int) -> jobs_pb2.Job:
    """The job once it trains at this size, a few steps on."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        job = client.get(JOB)
        if job.generation.world_size == nodes and job.progress.generation == job.generation.number:
            before = job.progress.step
            while job.progress.step < before + 5 and time.monotonic() < deadline_s:
                time.sleep(0.1)
                job = client.get(JOB)
            return job
        time.sleep(0.1)
    raise SystemExit(f"the job did not train with {nodes} workers within {LIMIT_S:.0f} s: {client.get(JOB).reason}")


if __name__ == "__main__":
    main()
