"""Names that others rely on: labels, objects, variables. Pure."""

from __future__ import annotations

import hashlib

GROUP, VERSION, KIND, PLURAL = "stretto.dev", "v1alpha1", "ElasticTrainingJob", "elastictrainingjobs"
API_VERSION = f"{GROUP}/{VERSION}"
FIELD_MANAGER = "stretto-operator"
JOB_LABEL = f"{GROUP}/job-name"
INDEX_LABEL = f"{GROUP}/node-index"
MANAGED_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "stretto-operator"
OURS = f"{MANAGED_LABEL}={MANAGED_BY}"
# Where a pod finds what its Secret holds, and its checkpoints.
CREDENTIALS_PATH = "/var/run/stretto"
CHECKPOINTS_PATH = "/stretto/checkpoints"
CA_KEY, TOKEN_KEY = "ca.crt", "token"
# A pod's name is its host name, a label of at most 63 characters: this leaves room for an index.
NAME_LENGTH = 52


def controller_job(namespace: str, name: str) -> str:
    """The job's name in the controller: a DNS label, and another one for the same name in another namespace."""
    digest = hashlib.sha256(f"{namespace}/{name}".encode()).hexdigest()[:10]
    return f"{name}-{digest}"


def pod(job: str, index: int) -> str:
    return f"{job}-{index}"


def secret(job: str) -> str:
    return f"{job}-stretto"


def selector(job: str) -> str:
    """The label selector of a job's pods, as the scale subresource gives it."""
    return f"{JOB_LABEL}={job}"


def labels(job: str) -> dict[str, str]:
    """Of every object that belongs to a job."""
    return {JOB_LABEL: job, MANAGED_LABEL: MANAGED_BY}
