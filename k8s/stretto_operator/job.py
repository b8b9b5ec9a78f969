"""An ElasticTrainingJob as frozen values, read from the API object. Pure.

The API server fills in defaults and refuses most of what is wrong; `read_job` says the rest in words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stretto_operator import names
from stretto_operator.record import Record, read_record
from stretto_operator.times import duration_s, from_text

DEFAULT_MAX_NODES = 256
DEFAULT_BACKOFF_LIMIT = 6
MODES = ("", "restart", "in-process")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a job keeps its checkpoints: at a URL, or in a folder of a PersistentVolumeClaim."""

    url: str = ""
    claim: str = ""
    path: str = ""
    interval_s: float = 0.0

    @property
    def place(self) -> str:
        """As the script sees it."""
        return self.url or "/".join(filter(None, (names.CHECKPOINTS_PATH, self.path.strip("/"))))


@dataclass(frozen=True, slots=True)
class Autoscale:
    """How the controller chooses the job's size. Zero and empty mean: not said."""

    mode: str = ""
    goal: str = ""
    efficiency_floor: float = 0.0
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Training:
    """What the controller is told of the job. Zero and empty mean: not said."""

    min_nodes: int = 1
    max_nodes: int = DEFAULT_MAX_NODES
    mode: str = ""
    base_batch_size: int = 0
    batch_size: int = 0
    global_batch_size: int = 0
    target_tau: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a user wants, and what this operator has recorded of it so far."""

    namespace: str
    name: str
    uid: str
    # Of the object, metadata.generation; the controller's generations are something else.
    revision: int
    created_s: float
    deleting: bool
    template: Mapping[str, Any]
    nodes: int = 1
    slots: int = 1
    training: Training = Training()
    checkpoint: Checkpoint | None = None
    autoscale: Autoscale = Autoscale()
    backoff_limit: int = DEFAULT_BACKOFF_LIMIT
    ttl_s: float | None = None
    suspend: bool = False
    disruption_budget: bool = False
    topology_key: str = ""
    record: Record = field(default_factory=Record)

    @property
    def controller_job(self) -> str:
        return names.controller_job(self.namespace, self.name)


def read_job(manifest: Mapping[str, Any]) -> Job:
    """The job of an API object, or of a file before the API server saw it. Raises ValueError in words."""
    metadata, spec = manifest.get("metadata") or {}, manifest.get("spec") or {}
    if (manifest.get("apiVersion"), manifest.get("kind")) != (names.API_VERSION, names.KIND):
        given = f"{manifest.get('apiVersion')} {manifest.get('kind')}"
        raise ValueError(f"this is a {given}; an {names.API_VERSION} {names.KIND} is needed")
    name = str(metadata.get("name", ""))
    if len(name) > names.NAME_LENGTH or not _LABEL.fullmatch(name):
        raise ValueError(
            f"metadata.name is {name!r}; it is a DNS label of at most {names.NAME_LENGTH} characters: a-z, 0-9 and '-'"
        )
    job = Job(
        namespace=str(metadata.get("namespace") or "default"),
        name=name,
        uid=str(metadata.get("uid", "")),
        revision=int(metadata.get("generation", 1)),
        created_s=from_text(metadata.get("creationTimestamp")) or 0.0,
        deleting=bool(metadata.get("deletionTimestamp")),
        template=spec.get("template") or {},
        nodes=_whole(spec, "nodes", 1),
        slots=_whole(spec, "slotsPerNode", 1),
        training=_read_training(spec),
        checkpoint=_read_checkpoint(spec.get("checkpoint")),
        autoscale=_read_autoscale(spec.get("autoscale") or {}),
        backoff_limit=_whole(spec, "backoffLimit", DEFAULT_BACKOFF_LIMIT, least=0),
        ttl_s=None if spec.get("ttlSecondsAfterFinished") is None else float(spec["ttlSecondsAfterFinished"]),
        suspend=bool(spec.get("suspend", False)),
        disruption_budget=bool(spec.get("podDisruptionBudget", False)),
        topology_key=str(spec.get("topologySpread", "")),
        record=read_record(manifest.get("status") or {}),
    )
    _check(job)
    return job


def _check(job: Job) -> None:
    least, most = job.training.min_nodes, job.training.max_nodes
    if not least <= job.nodes <= most:
        raise ValueError(
            f"spec.nodes is {job.nodes}, spec.minNodes {least} and spec.maxNodes {most}; "
            "give minNodes <= nodes <= maxNodes"
        )
    if not (job.template.get("spec") or {}).get("containers"):
        raise ValueError("spec.template.spec.containers is empty; give the container that trains")


def _read_training(spec: Mapping[str, Any]) -> Training:
    mode = str(spec.get("reconfigure", ""))
    if mode not in MODES:
        raise ValueError(f"spec.reconfigure is {mode!r}; allowed are restart and in-process")
    training = Training(
        min_nodes=_whole(spec, "minNodes", 1),
        max_nodes=_whole(spec, "maxNodes", DEFAULT_MAX_NODES),
        mode=mode,
        base_batch_size=_whole(spec, "baseBatchSize", 0, least=0),
        batch_size=_whole(spec, "batchSize", 0, least=0),
        global_batch_size=_whole(spec, "globalBatchSize", 0, least=0),
        target_tau=float(spec.get("targetTau", 0)),
    )
    if (training.batch_size or training.global_batch_size) and not training.base_batch_size:
        raise ValueError("spec.batchSize or spec.globalBatchSize was given without spec.baseBatchSize; give both")
    return training


def _read_checkpoint(given: Mapping[str, Any] | None) -> Checkpoint | None:
    if not given:
        return None
    checkpoint = Checkpoint(
        url=str(given.get("url", "")),
        claim=str(given.get("pvc", "")),
        path=str(given.get("path", "")),
        interval_s=duration_s(given["interval"]) if given.get("interval") else 0.0,
    )
    if bool(checkpoint.url) == bool(checkpoint.claim):
        raise ValueError("spec.checkpoint names a url or a pvc, and not both")
    return checkpoint


def _read_autoscale(given: Mapping[str, Any]) -> Autoscale:
    autoscale = Autoscale(
        mode=str(given.get("mode", "")),
        goal=str(given.get("goal", "")),
        efficiency_floor=float(given.get("efficiencyFloor", 0)),
        deadline_s=from_text(given.get("deadline")) or 0.0,
    )
    for name, value, allowed in (
        ("mode", autoscale.mode, ("", "off", "recommend", "act")),
        ("goal", autoscale.goal, ("", "progress", "cost", "deadline")),
    ):
        if value not in allowed:
            raise ValueError(f"spec.autoscale.{name} is {value!r}; allowed are {', '.join(allowed[1:])}")
    if (autoscale.goal == "deadline") != bool(autoscale.deadline_s):
        raise ValueError("spec.autoscale.deadline and goal: deadline belong together; give both, or neither")
    return autoscale


def _whole(spec: Mapping[str, Any], key: str, default: int, *, least: int = 1) -> int:
    value = spec.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"spec.{key} is {value!r}; it must be a whole number of at least {least}")
    return value
