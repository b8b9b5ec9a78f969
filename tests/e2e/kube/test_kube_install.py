"""A real API server takes everything that we give people to install."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.kubectl import Kubectl
from manifests.rendering import EXAMPLES, NAMESPACE, VARIANTS, Json, base, chart, documents

pytestmark = [pytest.mark.e2e, pytest.mark.kube, pytest.mark.timeout(300)]

# Resources that other projects bring; they are not there.
KINDS_OF_OTHERS = {"ServiceMonitor", "PrometheusRule", "PyTorchJob", "TrainingRuntime", "TrainJob", "ScaledObject"}


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
