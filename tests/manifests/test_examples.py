"""k8s/examples: each is what its API takes, and says what the docs say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from harness.controller import STRETTO
from jsonschema import Draft202012Validator
from manifests.rendering import CRD, EXAMPLES, ROOT, Json, breaches, documents, job_schema, pod_templates

OURS = "ElasticTrainingJob"
# Of others, and not in Kubernetes' own schemas: the pods in them are checked all the same.
KINDS_OF_OTHERS = {"PyTorchJob", "TrainingRuntime", "TrainJob", "ScaledObject"}
FILES = sorted(EXAMPLES.glob("*.yaml"))


def objects(path: Path) -> list[Json]:
    return documents(path.read_text())


def faults(job: Json) -> list[str]:
    """What the CRD's schema says against a job."""
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(job_schema()).iter_errors(job)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    for found in objects(path):
        if found["kind"] == OURS:
            assert faults(found) == []
        elif found["kind"] not in KINDS_OF_OTHERS:
            kubernetes_validate.validate(found, "1.37", strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_pods_in_examples_are_valid(path: Path) -> None:
    for found in objects(path):
        for template in pod_templates(found):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_begin_with_what_they_are_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", [path for path in FILES if OURS in path.read_text()], ids=lambda path: path.stem)
def test_the_pods_that_the_operator_would_make_are_valid_and_restricted(path: Path) -> None:
    jobs = [found for found in objects(path) if found["kind"] == OURS]
    if not jobs:
        pytest.skip("names a job of another file")
    done = subprocess.run([STRETTO, "k8s", "render", "-f", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = documents(done.stdout)
    assert len([found for found in made if found["kind"] == "Pod"]) == jobs[0]["spec"]["nodes"]
    for found in made:
        for owner in found["metadata"]["ownerReferences"]:
            owner["uid"] = "known once the object is there"
        kubernetes_validate.validate(found, "1.37", strict=True)
        if found["kind"] == "Pod":
            assert breaches(found) == []


def test_the_schema_that_examples_are_held_against_refuses_what_is_wrong() -> None:
    (job,) = [found for found in objects(EXAMPLES / "mnist.yaml") if found["kind"] == OURS]
    assert faults({**job, "spec": {**job["spec"], "node": 3}})
    assert faults({**job, "spec": {**job["spec"], "nodes": "three"}})
    assert faults({**job, "spec": {**job["spec"], "nodes": 0}})
    assert faults({**job, "spec": {key: value for key, value in job["spec"].items() if key != "template"}})


def test_scalers_name_a_job_of_the_examples() -> None:
    there = {found["metadata"]["name"] for path in FILES for found in objects(path) if found["kind"] == OURS}
    group = yaml.safe_load(CRD.read_text())["spec"]["group"]
    for name in ("autoscaler.yaml", "keda.yaml"):
        (scaler,) = objects(EXAMPLES / name)
        target = scaler["spec"]["scaleTargetRef"]
        assert target["name"] in there
        assert target["apiVersion"] == f"{group}/v1alpha1"


def test_the_page_names_every_example_and_no_other() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert set(re.findall(r"k8s/examples/([\w-]+\.yaml)", page)) == {path.name for path in FILES}
