"""`stretto k8s render`: the objects of a job before any cluster has seen it. Pure, but for what YAML reads."""

from __future__ import annotations

from typing import Any

import yaml

from stretto_operator import names
from stretto_operator.belongings import disruption_budget_manifest
from stretto_operator.job import read_job
from stretto_operator.pod_template import pod_manifest
from stretto_operator.surroundings import Surroundings


def rendered(text: str, endpoint: str) -> str:
    """YAML of all objects of the ElasticTrainingJobs in `text`; other objects are passed over. Raises ValueError."""
    try:
        documents = [each for each in yaml.safe_load_all(text) if each]
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from error
    jobs = [each for each in documents if isinstance(each, dict) and each.get("kind") == names.KIND]
    if not jobs:
        raise ValueError(f"no {names.KIND} was given; it begins with apiVersion: {names.API_VERSION}")
    return yaml.safe_dump_all((made for each in jobs for made in objects(each, endpoint)), sort_keys=False, width=120)


def objects(manifest: dict[str, Any], endpoint: str) -> list[dict[str, Any]]:
    """The pods, and the PodDisruptionBudget if there is to be one. A token's Secret is made in the cluster only."""
    job = read_job(manifest)
    around = Surroundings(endpoint)
    budget = disruption_budget_manifest(job)
    made = [*([budget] if budget is not None else []), *(pod_manifest(job, i, around) for i in range(job.nodes))]
    for each in made:
        # Only the API server gives uids.
        for owner in each["metadata"]["ownerReferences"]:
            owner.pop("uid")
    return [] if job.suspend else made
