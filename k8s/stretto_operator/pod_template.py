"""The pod of one index: the user's template, completed. What the template says itself stays as it is. Pure."""

from __future__ import annotations

import copy
from typing import Any

from stretto_operator import names
from stretto_operator.job import Job
from stretto_operator.surroundings import Surroundings

TRAINER = "trainer"
_GRACE_PERIOD_S = 60
# A node that is lost is given up sooner than Kubernetes' 300 s: training goes on without it anyway.
_LOST_NODE_S = 30
_LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def pod_manifest(job: Job, index: int, around: Surroundings) -> dict[str, Any]:
    """The pod as it is created."""
    template = copy.deepcopy(dict(job.template))
    metadata, spec = template.get("metadata") or {}, template["spec"]
    # A replacement elsewhere, with a fresh agent, is better than the same container again: the operator makes it.
    spec["restartPolicy"] = "Never"
    spec.setdefault("terminationGracePeriodSeconds", _GRACE_PERIOD_S)
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    _tolerate(spec)
    _restrict(spec)
    if job.topology_key:
        spec.setdefault("topologySpreadConstraints", [_spread(job)])
    trainer = next((each for each in spec["containers"] if each.get("name") == TRAINER), spec["containers"][0])
    _mount(spec, trainer, job, around)
    _set_environment(trainer, _environment(job, index, around))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": names.pod(job.name, index),
            "namespace": job.namespace,
            "labels": {**(metadata.get("labels") or {}), **names.labels(job.name), names.INDEX_LABEL: str(index)},
            **({"annotations": metadata["annotations"]} if metadata.get("annotations") else {}),
            "ownerReferences": [owner(job)],
        },
        "spec": spec,
    }


def owner(job: Job) -> dict[str, Any]:
    """The garbage collector removes what belongs to a job that is gone; nothing of it blocks the job's deletion."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _tolerate(spec: dict[str, Any]) -> None:
    tolerations = spec.setdefault("tolerations", [])
    for key in _LOST:
        if not any(each.get("key") in (key, None) for each in tolerations):
            tolerations.append(
                {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _LOST_NODE_S}
            )


def _restrict(spec: dict[str, Any]) -> None:
    """Kubernetes' restricted profile, where the template is silent."""
    security = spec.setdefault("securityContext", {})
    security.setdefault("runAsNonRoot", True)
    security.setdefault("seccompProfile", {"type": "RuntimeDefault"})
    for container in (*spec["containers"], *(spec.get("initContainers") or ())):
        own = container.setdefault("securityContext", {})
        own.setdefault("allowPrivilegeEscalation", False)
        own.setdefault("capabilities", {"drop": ["ALL"]})


def _spread(job: Job) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": job.topology_key,
        # A wish: a node that is where others are is better than none.
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {names.JOB_LABEL: job.name}},
    }


def _mount(spec: dict[str, Any], trainer: dict[str, Any], job: Job, around: Surroundings) -> None:
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if around.ca:
        item = {"key": names.CA_KEY, "path": names.CA_KEY}
        volumes.append({"name": "stretto-ca", "secret": {"secretName": names.secret(job.name), "items": [item]}})
        mounts.append({"name": "stretto-ca", "mountPath": names.CREDENTIALS_PATH, "readOnly": True})
    if job.checkpoint is not None and job.checkpoint.claim:
        claim = {"claimName": job.checkpoint.claim}
        volumes.append({"name": "stretto-checkpoints", "persistentVolumeClaim": claim})
        mounts.append({"name": "stretto-checkpoints", "mountPath": names.CHECKPOINTS_PATH})
    if volumes:
        spec["volumes"] = [*(spec.get("volumes") or ()), *volumes]
        trainer["volumeMounts"] = [*(trainer.get("volumeMounts") or ()), *mounts]


def _environment(job: Job, index: int, around: Surroundings) -> list[dict[str, Any]]:
    """Ours, and torchrun's own variables, so that `torchrun train.py` needs no options."""
    training = job.training
    values = {
        "STRETTO_ENDPOINT": around.endpoint,
        "STRETTO_JOB": job.controller_job,
        "STRETTO_NODE": names.pod(job.name, index),
        "PET_RDZV_BACKEND": "stretto",
        "PET_RDZV_ENDPOINT": around.endpoint,
        "PET_RDZV_ID": job.controller_job,
        "PET_NNODES": f"{training.min_nodes}:{training.max_nodes}",
        "PET_NPROC_PER_NODE": str(job.slots),
    }
    if training.mode:
        values["PET_RDZV_CONF"] = f"reconfigure={training.mode}"
    if around.ca:
        values["STRETTO_TLS_CA"] = f"{names.CREDENTIALS_PATH}/{names.CA_KEY}"
    if around.insecure:
        values["STRETTO_INSECURE"] = "1"
    if job.checkpoint is not None:
        values["STRETTO_CHECKPOINT"] = job.checkpoint.place
        if job.checkpoint.interval_s:
            values["STRETTO_CHECKPOINT_INTERVAL_S"] = f"{job.checkpoint.interval_s:g}"
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    if around.issuer_key:
        reference = {"name": names.secret(job.name), "key": names.TOKEN_KEY}
        environment.append({"name": "STRETTO_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    return environment


def _set_environment(trainer: dict[str, Any], environment: list[dict[str, Any]]) -> None:
    """Ours first, so that the template's own values may refer to them, as in $(STRETTO_CHECKPOINT)."""
    own = trainer.get("env") or []
    said = {each["name"] for each in own}
    trainer["env"] = [*(each for each in environment if each["name"] not in said), *own]
