"""What a job has beside its pods: a Secret with its token, a PodDisruptionBudget on request. Pure."""

from __future__ import annotations

import base64
from typing import Any

from stretto_operator import names
from stretto_operator.job import Job
from stretto_operator.pod_template import owner
from stretto_operator.surroundings import Surroundings, job_token


def secret_manifest(job: Job, around: Surroundings) -> dict[str, Any] | None:
    """None where there is nothing to keep: a controller without tokens and TLS."""
    data = {}
    if around.issuer_key:
        data[names.TOKEN_KEY] = job_token(around.issuer_key, job.controller_job, job.uid)
    if around.ca:
        data[names.CA_KEY] = around.ca
    if not data:
        return None
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return _object(job, "v1", "Secret", names.secret(job.name), {"type": "Opaque", "data": encoded})


def disruption_budget_manifest(job: Job) -> dict[str, Any] | None:
    """Nobody evicts, on purpose, so many pods that fewer than the minimum are left."""
    if not job.disruption_budget:
        return None
    spec = {
        "minAvailable": job.training.min_nodes,
        "selector": {"matchLabels": {names.JOB_LABEL: job.name}},
    }
    return _object(job, "policy/v1", "PodDisruptionBudget", job.name, {"spec": spec})


def _object(job: Job, api_version: str, kind: str, name: str, content: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": job.namespace,
        "labels": names.labels(job.name),
        "ownerReferences": [owner(job)],
    }
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **content}
