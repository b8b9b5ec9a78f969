"""Writes fleet-160.yaml: 160 jobs on 64 nodes over 8 hours. All numbers are drawn here; docs/goodput.md says why so.

python examples/traces/make_trace.py > examples/traces/fleet-160.yaml
"""

from __future__ import annotations

import math
import random

JOBS, NODES, HOURS = 160, 64, 8.0
# share of the jobs, hours on one node from .. to: many short ones and few long ones, as in published cluster traces.
SIZES = [(0.40, 0.1, 1.0), (0.40, 1.0, 6.0), (0.20, 6.0, 24.0)]


def gain(noise: float, scale: float) -> float:
    return (noise + 1) / (noise / scale + 1)


def owners_choice(rng: random.Random, job: dict[str, float], noise: float) -> int:
    """One of the sizes that run at 50 to 80 % of linear speed-up half way through: who owns the job has tried them.

    This is how Pollux' evaluation tunes the jobs of its fixed-size baselines (Qiao et al., OSDI 2021, section 5.2).
    """

    def rate(nodes: int) -> float:
        seconds = job["overhead_s"] + job["sample_s"] * 32
        seconds += (nodes > 1) * job["exchange_s"] + max(nodes - 2, 0) * job["hop_s"]
        return gain(noise, nodes) / seconds

    valid = [nodes for nodes in range(2, 17) if 0.5 <= rate(nodes) / rate(1) / nodes <= 0.8]
    return rng.choice(valid) if valid else 1


def main() -> None:
    rng = random.Random(160)
    print(f"# Synthetic: {JOBS} jobs on {NODES} nodes, written by make_trace.py (seed 160).\nnodes: {NODES}\ncapacity:")
    # A quarter of the nodes are spot nodes: at times some of them are taken away.
    at_s = 0.0
    for _ in range(10):
        at_s += rng.uniform(0.5, 2.5) * 3600
        gone = rng.randint(4, 16)
        print(f"  - {{at_s: {at_s:.0f}, nodes: {NODES - gone}}}")
        at_s += rng.uniform(0.2, 1.0) * 3600
        print(f"  - {{at_s: {at_s:.0f}, nodes: {NODES}}}")
    print("failures:")
    for _ in range(40):
        print(f"  - {{at_s: {rng.uniform(0, 20 * 3600):.0f}, node: {rng.randrange(NODES)}, repair_s: 600}}")
    print("jobs:")
    arrivals = sorted(rng.uniform(0, HOURS * 3600) for _ in range(JOBS))
    for number, arrives_s in enumerate(arrivals):
        _, least_h, most_h = rng.choices(SIZES, [share for share, _, _ in SIZES])[0]
        alone_s = 3600 * math.exp(rng.uniform(math.log(least_h), math.log(most_h)))
        # Noise grows as training goes on: by 3 to 30 times. One job's is up to 100 times another's.
        noise_begin = math.exp(rng.uniform(math.log(0.2), math.log(20)))
        noise_end = noise_begin * math.exp(rng.uniform(math.log(3), math.log(30)))
        compute_s = math.exp(rng.uniform(math.log(0.1), math.log(1.0)))
        job = {
            "overhead_s": 0.2 * compute_s,
            "sample_s": 0.8 * compute_s / 32,
            "exchange_s": compute_s * rng.uniform(0.02, 0.4),
            "hop_s": compute_s * rng.uniform(0.001, 0.02),
        }
        fixed = owners_choice(rng, job, math.sqrt(noise_begin * noise_end))
        told = ", ".join(f"{name}: {value:.4g}" for name, value in job.items())
        print(
            f"  - {{name: job-{number:03d}, arrives_s: {arrives_s:.0f}, {told}, base_batch_size: 32, batch_size: 32, "
            f"noise_begin: {noise_begin:.3g}, noise_end: {noise_end:.3g}, target_tau: {alone_s / compute_s:.0f}, "
            f"fixed_nodes: {fixed}}}"
        )


if __name__ == "__main__":
    main()
