"""Messages from nodes, workers and tools -> core events. A bad value raises Rejected, and nothing has happened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise

from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

from stretto_controller.core import events as ev
from stretto_controller.core.errors import Rejected
from stretto_controller.core.model import JobSpec, Mode, Ready, Version, WorkerReady
from stretto_controller.core.report import Checkpoint, Histogram, Pace, Progress
from stretto_controller.wire import checks

PROTOCOL_VERSION = 1

_KEY_LEAST, _KEY_LIMIT = 16, 256
_MESSAGE_LIMIT = 4096
_PATH_LIMIT = 4096
# Learning rates: one per parameter group.
_GROUPS_LIMIT = 1024
_BUCKETS_LIMIT = 64
# Ranks that a worker could not reach.
_UNREACHABLE_LIMIT = 4096

_MODES = {
    types.RECONFIGURE_MODE_UNSPECIFIED: None,
    types.RECONFIGURE_MODE_RESTART: Mode.RESTART,
    types.RECONFIGURE_MODE_IN_PROCESS: Mode.IN_PROCESS,
}


def node_hello(message: rendezvous.AttendRequest, session_id: str) -> tuple[str, ev.NodeHello]:
    """The job and the event of a node's first message."""
    if message.WhichOneof("body") != "hello":
        raise Rejected.invalid(f"the first message is {_kind(message)}; a stream begins with hello")
    hello = message.hello
    _check_version(hello.protocol_version)
    event = ev.NodeHello(
        node_id=checks.node_id(hello.node_id),
        key_hash=_hashed(checks.secret("node_key", hello.node_key, _KEY_LEAST, _KEY_LIMIT)),
        session_id=session_id,
        slots=checks.count("slots", hello.slots, 1),
        address=checks.address(hello.address),
        spec=job_spec(hello.spec),
        generation=checks.count("generation", hello.generation),
        ready=_ready(hello.ready) if hello.HasField("ready") else None,
    )
    return checks.job_name(hello.job), event


def node_event(message: rendezvous.AttendRequest, node_id: str, session_id: str) -> ev.Event:
    """Any later message of a node."""
    kind = message.WhichOneof("body")
    if kind == "heartbeat":
        return ev.NodeHeartbeat(node_id, session_id)
    if kind == "ready":
        return ev.NodeReady(node_id, session_id, _ready(message.ready))
    if kind == "succeeded":
        # 0 in in-process mode: the agent does not know in which generations its workers were.
        return ev.NodeSucceeded(node_id, session_id, checks.count("generation", message.succeeded.generation))
    if kind == "leave":
        leave = message.leave
        if leave.reason not in rendezvous.LeaveReason.values():
            raise Rejected.invalid(f"reason is {leave.reason}; known are {rendezvous.LeaveReason.keys()}")
        return ev.NodeLeft(
            node_id,
            session_id,
            failed=leave.reason == rendezvous.LEAVE_REASON_FAILED,
            succeeded=leave.reason == rendezvous.LEAVE_REASON_SUCCEEDED,
            message=checks.text("message", leave.message, _MESSAGE_LIMIT),
        )
    raise Rejected.invalid(f"{_kind(message)} does not belong here; hello comes once, first")


def worker_hello(message: training.TrainRequest, session_id: str) -> tuple[str, ev.WorkerHello]:
    """The job and the event of a worker's first message."""
    if message.WhichOneof("body") != "hello":
        raise Rejected.invalid(f"the first message is {_kind(message)}; a stream begins with hello")
    hello = message.hello
    _check_version(hello.protocol_version)
    checks.count("step", hello.step)
    event = ev.WorkerHello(
        session_id=session_id,
        node_id=checks.node_id(hello.node_id),
        local_rank=checks.count("local_rank", hello.local_rank),
        rank=checks.count("rank", hello.rank, -1),
        generation=checks.count("generation", hello.generation),
        spec=job_spec(hello.spec),
        ready=_worker_ready(hello.ready) if hello.HasField("ready") else None,
    )
    if (event.rank < 0) != (event.generation == 0):
        raise Rejected.invalid(
            f"rank is {event.rank} and generation is {event.generation}; "
            "a worker in a generation has a rank from 0, one in none says -1 and 0"
        )
    if event.ready is not None and event.generation:
        raise Rejected.invalid(
            f"ready comes with generation {event.generation}; only a worker that is in none asks for the next"
        )
    return checks.job_name(hello.job), event


def worker_event(message: training.TrainRequest, session_id: str) -> ev.Event:
    """Any later message of a worker."""
    kind = message.WhichOneof("body")
    if kind == "progress":
        return ev.WorkerProgressed(session_id, _progress(message.progress))
    if kind == "left":
        left = message.left
        return ev.WorkerLeft(
            session_id, checks.count("generation", left.generation, 1), checks.count("step", left.step)
        )
    if kind == "checkpoint":
        return ev.CheckpointCommitted(session_id, _checkpoint(message.checkpoint))
    if kind == "checkpoint_failed":
        failed = message.checkpoint_failed
        return ev.CheckpointFailed(
            session_id,
            checks.count("generation", failed.generation),
            checks.count("step", failed.step),
            checks.text("reason", failed.reason, 1000),
        )
    if kind == "finished":
        finished = message.finished
        return ev.WorkerFinished(
            session_id,
            checks.count("generation", finished.generation, 1),
            checks.count("step", finished.step),
            checks.amount("tau", finished.tau),
        )
    if kind == "draining":
        return ev.WorkerDraining(session_id, checks.count("generation", message.draining.generation))
    if kind == "alive":
        return ev.WorkerAlive(session_id, _pace(message.alive))
    if kind == "ready":
        return ev.WorkerAsked(session_id, _worker_ready(message.ready))
    raise Rejected.invalid(f"{_kind(message)} does not belong here; hello comes once, first")


def job_spec(message: types.JobSpec) -> JobSpec:
    """What the message says of a job; the core checks whether it fits together."""
    if message.mode not in _MODES:
        raise Rejected.invalid(f"mode is {message.mode}; known are {types.ReconfigureMode.keys()}")
    spec = JobSpec(
        min_nodes=checks.count("min_nodes", message.min_nodes),
        max_nodes=checks.count("max_nodes", message.max_nodes),
        mode=_MODES[message.mode],
        base_batch_size=checks.count("base_batch_size", message.base_batch_size),
        batch_size=checks.count("batch_size", message.batch_size),
        global_batch_size=checks.count("global_batch_size", message.global_batch_size),
        target_tau=checks.amount("target_tau", message.target_tau),
    )
    spec.validate()
    return spec


def _ready(message: rendezvous.NodeReady) -> Ready:
    return Ready(
        request_id=checks.count("request_id", message.request_id, 1),
        generation=checks.count("generation", message.generation),
        failed=message.failed,
        exit_signal=checks.count("exit_signal", message.exit_signal),
        restarts_left=checks.count("restarts_left", message.restarts_left, -1),
        master_port=checks.port("master_port", message.master_port),
        store_port=checks.port("store_port", message.store_port),
    )


def _worker_ready(message: training.WorkerReady) -> WorkerReady:
    if len(message.unreachable) > _UNREACHABLE_LIMIT:
        raise Rejected.invalid(
            f"unreachable has {len(message.unreachable)} ranks; at most {_UNREACHABLE_LIMIT} are allowed"
        )
    ready = WorkerReady(
        request_id=checks.count("request_id", message.request_id, 1),
        generation=checks.count("generation", message.generation),
        version=Version(
            checks.count("version_generation", message.version_generation),
            checks.count("version_step", message.version_step),
        ),
        failed=message.failed,
        unreachable=tuple(checks.count("unreachable", rank) for rank in message.unreachable),
        store_port=checks.port("store_port", message.store_port),
        preflight_port=checks.port("preflight_port", message.preflight_port),
    )
    if ready.version.generation > ready.generation:
        raise Rejected.invalid(
            f"version_generation is {ready.version.generation} and generation is {ready.generation}; "
            "a state is no newer than the generation that its worker left last"
        )
    return ready


def _pace(message: training.WorkerAlive) -> Pace:
    return Pace(
        generation=checks.count("generation", message.generation),
        step=checks.count("step", message.step),
        working_s=checks.amount("working_s", message.working_s),
        waiting_s=checks.amount("waiting_s", message.waiting_s),
        median_step_s=checks.amount("median_step_s", message.median_step_s),
    )


def _progress(message: types.Progress) -> Progress:
    """Figures that decide are checked; loss, gain, rates and variances may be anything that a diverged run makes."""
    return Progress(
        generation=checks.count("generation", message.generation, 1),
        step=checks.count("step", message.step),
        tau=checks.amount("tau", message.tau),
        gain=message.gain,
        scale=checks.amount("scale", message.scale),
        loss=message.loss,
        effective_lr=_rates("effective_lr", message.effective_lr),
        base_lr=_rates("base_lr", message.base_lr),
        variance=message.variance,
        sqr_norm=message.sqr_norm,
        samples=checks.count("samples", message.samples),
        epoch=checks.count("epoch", message.epoch),
        generation_steps=checks.count("generation_steps", message.generation_steps),
        generation_gain_sum=checks.amount("generation_gain_sum", message.generation_gain_sum),
        generation_first_tau=checks.amount("generation_first_tau", message.generation_first_tau),
        pause_s=checks.amount("pause_s", message.pause_s),
        step_seconds=_histogram(message.step_seconds),
        orthogonality=_orthogonality(message.orthogonality),
    )


def _orthogonality(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) not in (0, 3):
        raise Rejected.invalid(f"orthogonality has {len(values)} values; give minimum, median and maximum, or none")
    return tuple(values)


def _rates(field: str, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) > _GROUPS_LIMIT:
        raise Rejected.invalid(f"{field} has {len(values)} values; at most {_GROUPS_LIMIT} are allowed")
    return tuple(values)


def _histogram(message: types.Histogram) -> Histogram:
    bounds, counts = tuple(message.upper_bounds), tuple(message.cumulative_counts)
    if len(bounds) > _BUCKETS_LIMIT or len(bounds) != len(counts):
        raise Rejected.invalid(
            f"step_seconds has {len(bounds)} upper_bounds and {len(counts)} cumulative_counts; "
            f"give as many of one as of the other, at most {_BUCKETS_LIMIT}"
        )
    if not all(a < b for a, b in pairwise((-math.inf, *bounds))):
        raise Rejected.invalid(f"step_seconds.upper_bounds are {bounds}; they must rise")
    total = checks.count("step_seconds.count", message.count)
    if any(a > b for a, b in zip((0, *counts), (*counts, total), strict=True)):
        raise Rejected.invalid(
            f"step_seconds.cumulative_counts are {counts} and count is {total}; they must not fall, nor begin below 0"
        )
    return Histogram(bounds, counts, total, checks.amount("step_seconds.sum", message.sum))


def _checkpoint(message: types.CheckpointCommitted) -> Checkpoint:
    return Checkpoint(
        generation=checks.count("generation", message.generation, 1),
        step=checks.count("step", message.step),
        tau=checks.amount("tau", message.tau),
        path=checks.text("path", message.path, _PATH_LIMIT),
        size_bytes=checks.count("size_bytes", message.size_bytes),
        duration_s=checks.amount("duration_s", message.duration_s),
    )


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise Rejected.precondition(
            f"protocol_version is {version}; this controller speaks {PROTOCOL_VERSION}; "
            "run the same stretto release on both sides"
        )


def _hashed(key: str) -> str:
    """Only this is kept: who reads the store cannot speak for a node."""
    return hashlib.sha256(key.encode()).hexdigest()


def _kind(message: rendezvous.AttendRequest | training.TrainRequest) -> str:
    return message.WhichOneof("body") or "of a kind that this release does not know"
