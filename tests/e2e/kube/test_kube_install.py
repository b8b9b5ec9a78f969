"""A real API server takes everything that we give people to install, and refuses nonsense in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.kubectl import Kubectl, KubectlError
from harness.operator import training_job
from manifests.rendering import EXAMPLES, NAMESPACE, VARIANTS, Json, base, chart, documents

pytestmark = [pytest.mark.e2e, pytest.mark.kube, pytest.mark.timeout(300)]

# Resources that other projects bring; they are not there.
KINDS_OF_OTHERS = {"ServiceMonitor", "PrometheusRule", "PyTorchJob", "TrainingRuntime", "TrainJob", "ScaledObject"}

IDLE = ["sleep", "infinity"]


@pytest.fixture(scope="module")
def kubectl(kubeconfig: Path, definition: None) -> Kubectl:
    found = Kubectl(kubeconfig, "")
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name in (NAMESPACE, "team"):
        found.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": restricted}})
    return found


def _take(kubectl: Kubectl, objects: list[Json]) -> None:
    known = [found for found in objects if found["kind"] not in KINDS_OF_OTHERS]
    if known:
        kubectl.apply(*known, dry_run=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_is_taken(kubectl: Kubectl, variant: str) -> None:
    _take(kubectl, chart(variant))


@pytest.mark.parametrize("name", ["default", "etcd", "trusted-network"])
def test_a_base_is_taken(kubectl: Kubectl, name: str) -> None:
    _take(kubectl, base(name))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_taken(kubectl: Kubectl, path: Path) -> None:
    _take(kubectl, documents(path.read_text()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": 9}, "nodes is 9; it must be at most maxNodes, 8"),
        ({"minNodes": 3}, "it must be at least minNodes, 3"),
        ({"nodes": 0}, "spec.nodes"),
        ({"nodes": "many"}, "spec.nodes"),
        ({"batchSize": 8}, "baseBatchSize"),
        ({"checkpoint": {"pvc": "a", "url": "s3://b"}}, "a url or a pvc"),
        ({"reconfigure": "sometimes"}, "reconfigure"),
    ],
)
def test_nonsense_is_refused_by_the_api_server_in_words(kubectl: Kubectl, change: Json, said: str) -> None:
    with pytest.raises(KubectlError, match=said):
        kubectl.apply(training_job("nonsense", IDLE, **change), dry_run=True)


def test_an_unknown_field_is_refused_by_kubectl(kubectl: Kubectl) -> None:
    with pytest.raises(KubectlError, match="node"):
        kubectl("create", "-f", "-", given=json.dumps(training_job("typo", IDLE, node=3)))
