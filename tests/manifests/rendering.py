"""The manifests as the tools of a user render them, and what every pod of ours has to keep to."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from harness.installed import lacking

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "stretto"
BASES = ROOT / "deploy" / "kustomize"
EXAMPLES = ROOT / "k8s" / "examples"
CRD = ROOT / "k8s" / "crd" / "elastictrainingjobs.stretto.dev.yaml"
RBAC = ROOT / "k8s" / "rbac"
NAMESPACE = "stretto-system"

# Every switch of the chart is on in one of these.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "three replicas with etcd": (
        "controller.store=etcd",
        "controller.replicas=3",
        "controller.etcd.endpoints=e0:2379\\,e1:2379",
        "controller.etcd.tlsSecret=etcd-client",
        "controller.etcd.passwordSecret=etcd-user",
        "operator.replicas=2",
    ),
    "secrets of one's own": (
        "security.certificateSecret=mine",
        "security.tokensSecret=mine-tokens",
        "security.clientSecret=mine-client",
        "images.controller.digest=sha256:" + 64 * "a",
    ),
    "a trusted network": ("security.insecure=true", "networkPolicy.enabled=true"),
    "everything watched": (
        "monitoring.serviceMonitor.enabled=true",
        "monitoring.prometheusRule.enabled=true",
        "monitoring.dashboards.enabled=true",
        "monitoring.prometheusRule.labels.release=prometheus",
        "networkPolicy.enabled=true",
    ),
    "one namespace only": (
        "operator.namespace=team",
        "controller.nodeSelector.disk=ssd",
        "controller.environment.STRETTO_LIMITS_SETTLE_S=2",
        "operator.tolerations[0].operator=Exists",
        "controller.priorityClassName=high",
        "controller.storage.className=fast",
    ),
}


def program(name: str) -> str:
    """helm or kubectl, as tools/kubernetes_tools.py put them beside Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        lacking(f"{path} is not there; `make test` brings it (tools/kubernetes_tools.py)")
    return str(path)


def helm(*arguments: str, values: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    # The environment takes strings only; a bare 2 would be a number.
    options = [f"--set{'-string' * ('.environment.' in value)}={value}" for value in values]
    command = [program("helm"), *arguments, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@functools.cache
def chart(variant: str) -> list[Json]:
    """The chart's objects."""
    done = helm("template", "stretto", str(CHART), "--namespace", NAMESPACE, values=VARIANTS[variant])
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


@functools.cache
def base(name: str) -> list[Json]:
    """A kustomize base's objects."""
    command = [program("kubectl"), "kustomize", str(BASES / name)]
    return documents(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def documents(text: str) -> list[Json]:
    return [found for found in yaml.safe_load_all(text) if found is not None]


def only(objects: list[Json], kind: str, name: str | None = None) -> Json:
    """The one object of this kind, and of this name if there are several."""
    (found,) = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return found


def pod_templates(value: Any) -> Iterator[Json]:
    """Every pod template anywhere in an object: what has a spec with containers."""
    if isinstance(value, dict):
        spec = value.get("spec")
        if isinstance(spec, dict) and "containers" in spec and value.get("kind") in (None, "Pod"):
            yield value
        for each in value.values():
            yield from pod_templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from pod_templates(each)


def breaches(template: Json) -> list[str]:
    """What of a pod the `restricted` pod security standard refuses; empty where it keeps to it."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    found = []
    if pod.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("seccompProfile is not RuntimeDefault")
    found += [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    allowed = {
        "name",
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    found += [
        f"volume {each['name']} is none of {sorted(allowed)}"
        for each in spec.get("volumes", [])
        if not set(each) <= allowed
    ]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        security = container.get("securityContext", {})
        if not security.get("runAsNonRoot", pod.get("runAsNonRoot")):
            found.append(f"{container['name']} may run as root")
        if security.get("allowPrivilegeEscalation") is not False:
            found.append(f"{container['name']} may escalate privileges")
        if "ALL" not in security.get("capabilities", {}).get("drop", []):
            found.append(f"{container['name']} keeps capabilities")
    return found


def strict(schema: Json) -> Json:
    """A structural schema as JSON schema that refuses unknown fields, as `kubectl apply` does."""
    told = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        told["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            told["additionalProperties"] = False
    if "items" in schema:
        told["items"] = strict(schema["items"])
    told.pop("default", None)
    return told


def job_schema() -> Json:
    """What an ElasticTrainingJob has to be, by the CRD."""
    definition = yaml.safe_load(CRD.read_text())
    schema = strict(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return json.loads(json.dumps(schema))  # type: ignore[no-any-return]  # JSON in, JSON out
