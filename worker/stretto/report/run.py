"""What a report is made of, whoever remembers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stretto_proto.v1 import jobs_pb2

from stretto.client import JobsClient


@dataclass(frozen=True, slots=True)
class Run:
    """One run under a job's name. source: who remembers it."""

    source: str
    job: jobs_pb2.Job
    points: jobs_pb2.ListPointsResponse
    generations: Sequence[jobs_pb2.GenerationSummary]
    events: Sequence[jobs_pb2.Event]


def from_controller(client: JobsClient, job: str, endpoint: str) -> Run:
    """What the controller keeps of a job. Raises StrettoError."""
    source = f"the controller at {endpoint}"
    return Run(source, client.get(job), client.points(job), client.generations(job), client.events(job))
