"""Chart, kustomize bases and RBAC: what they render is valid, secure, and fresh."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from harness.controller import STRETTO, ControllerProcess
from harness.installed import installed
from manifests.rendering import (
    BASES,
    CHART,
    CRD,
    NAMESPACE,
    RBAC,
    ROOT,
    VARIANTS,
    Json,
    base,
    breaches,
    chart,
    documents,
    helm,
    only,
    pod_templates,
)

# Their schemas are those of the Prometheus operator and ours; see the tests on each.
KINDS_OF_OTHERS = {"ServiceMonitor", "PrometheusRule"}
BASE_NAMES = ("default", "etcd", "trusted-network")


def validate(found: Json) -> None:
    """Raises ValidationError for what Kubernetes' own schemas refuse, unknown fields included."""
    if found["kind"] not in KINDS_OF_OTHERS:
        kubernetes_validate.validate(found, "1.37", strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_finds_no_fault_with_the_chart(variant: str) -> None:
    done = helm("lint", "--strict", str(CHART), values=VARIANTS[variant])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_of_the_chart_is_valid(variant: str) -> None:
    objects = chart(variant)
    for found in objects:
        validate(found)
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", BASE_NAMES)
def test_every_object_of_a_base_is_valid(name: str) -> None:
    for found in base(name):
        validate(found)


def test_bases_are_what_the_chart_gives(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "manifests.py", tmp_path], check=True, timeout=120)
    for name in BASE_NAMES:
        assert (tmp_path / name / "stretto.yaml").read_text() == (BASES / name / "stretto.yaml").read_text(), (
            "run `make manifests`"
        )


@pytest.mark.parametrize("objects", [*(chart(variant) for variant in VARIANTS), *(base(name) for name in BASE_NAMES)])
def test_pods_keep_to_the_restricted_profile(objects: list[Json]) -> None:
    templates = [template for found in objects for template in pod_templates(found)]
    assert len(templates) == 2, "a controller's and an operator's"
    for template in templates:
        assert breaches(template) == []
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert "limits" in container["resources"]
            assert not container["image"].endswith(":latest")


def test_the_controller_gets_no_token_of_kubernetes() -> None:
    objects = chart("as it comes")
    pod = only(objects, "StatefulSet")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    account = only(objects, "ServiceAccount", "stretto-controller")
    assert account["automountServiceAccountToken"] is False
    bound = [subject["name"] for found in objects if found["kind"].endswith("Binding") for subject in found["subjects"]]
    assert set(bound) == {"stretto-operator"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("controller.replicas=3",), "controller.store sqlite; one replica"),
        (("controller.store=etcd",), "without controller.etcd.endpoints"),
        (("security.tokensSecret=mine",), "without security.clientSecret"),
        (("controller.store=consul",), "controller/store"),
        (("replicas=3",), "replicas"),
        (("controller.environment.PATH=/bin",), "PATH"),
    ],
)
def test_values_that_make_no_sense_are_refused_in_words(values: tuple[str, ...], said: str) -> None:
    done = helm("template", "stretto", str(CHART), values=values)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_schema_knows_every_value_and_no_other() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(value: Json, told: Json, path: str) -> None:
        told = schema["$defs"][told["$ref"].rpartition("/")[2]] if "$ref" in told else told
        if not isinstance(value, dict) or "properties" not in told or "requests" in value:
            return
        assert told["additionalProperties"] is False, path
        assert set(value) == set(told["properties"]) - {"global"}, path
        for key, each in value.items():
            compare(each, told["properties"][key], f"{path}.{key}")

    compare(values, schema, "values")


def test_the_chart_gives_the_operator_the_rights_of_k8s_rbac() -> None:
    """And those are what it uses: tests/operator."""
    everything, leader = (documents((RBAC / name).read_text())[0] for name in ("cluster-role.yaml", "leader-role.yaml"))
    whole = chart("as it comes")
    assert only(whole, "ClusterRole")["rules"] == everything["rules"]
    assert only(whole, "Role")["rules"] == leader["rules"]
    narrow = chart("one namespace only")
    assert only(narrow, "Role", "stretto-operator")["rules"] == everything["rules"]
    assert only(narrow, "Role", "stretto-operator")["metadata"]["namespace"] == "team"
    assert not any(found["kind"].startswith("ClusterRole") for found in narrow)


def test_the_resource_definition_is_that_of_k8s_crd_and_outlives_the_release() -> None:
    told = only(chart("as it comes"), "CustomResourceDefinition")
    assert told["spec"] == yaml.safe_load(CRD.read_text())["spec"]
    assert told["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_replicas_are_told_each_others_names() -> None:
    objects = chart("three replicas with etcd")
    controller = only(objects, "StatefulSet")
    names = [f"stretto-controller-{n}.stretto-controller-pods.{NAMESPACE}.svc:29400" for n in range(3)]
    assert controller["spec"]["serviceName"] == only(objects, "Service", "stretto-controller-pods")["metadata"]["name"]
    (advertised,) = [
        word for word in controller["spec"]["template"]["spec"]["containers"][0]["args"] if "--advertise" in word
    ]
    assert advertised.replace("$(POD_NAME)", "stretto-controller-2") == f"--advertise={names[2]}"
    environment = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "STRETTO_ENDPOINT", "value": ",".join(names)} in environment
    assert only(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_mounts_have_volumes_and_secrets_have_the_keys_that_are_used() -> None:
    for variant in VARIANTS:
        objects = chart(variant)
        made = {found["metadata"]["name"]: set(found["data"]) for found in objects if found["kind"] == "Secret"}
        for found in objects:
            for template in pod_templates(found):
                volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
                volumes |= {claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", [])}
                (container,) = template["spec"]["containers"]
                assert {mount["name"] for mount in container["volumeMounts"]} == volumes
                for volume in template["spec"]["volumes"]:
                    keys = {item["key"] for item in volume.get("secret", {}).get("items", [])}
                    assert keys <= made.get(volume.get("secret", {}).get("secretName"), keys)
                for variable in container["env"]:
                    if "secretKeyRef" in variable.get("valueFrom", {}):
                        reference = variable["valueFrom"]["secretKeyRef"]
                        assert reference["key"] in made.get(reference["name"], {reference["key"]})


class ChartsController(ControllerProcess):
    """A controller with more arguments."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        super().__init__(directory)
        self._arguments = arguments

    def command(self) -> list[str]:
        return [*super().command(), *self._arguments]


def test_a_controller_serves_with_the_certificate_and_the_tokens_of_the_chart(tmp_path: Path) -> None:
    """With the chart's own arguments; names and authority fit, and the operator's token is an admin's."""
    objects = chart("as it comes")
    for name in ("certificate", "tokens", "client"):
        (tmp_path / name).mkdir()
        for key, value in only(objects, "Secret", f"stretto-{name}")["data"].items():
            (tmp_path / name / key).write_bytes(base64.b64decode(value))
    (container,) = only(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    arguments = [
        word.replace("/etc/stretto", str(tmp_path)).replace("0.0.0.0", "127.0.0.1") for word in container["args"]
    ]
    (tmp_path / "controller").mkdir()
    with ChartsController(tmp_path / "controller", arguments) as controller:
        for token, said in (("token", "no job"), ("viewer-token", "a token of viewer may not")):
            environment = {
                "STRETTO_ENDPOINT": controller.grpc,
                "STRETTO_TLS_CA": str(tmp_path / "certificate" / "ca.crt"),
                "STRETTO_TOKEN": (tmp_path / "client" / token).read_text(),
            }
            told = _ask(environment, "doctor")
            assert told.returncode == 0, told.stdout + told.stderr
            assert said in _ask(environment, "jobs", "pause", "absent").stderr


def _ask(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([STRETTO, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_alerts_are_rules_that_prometheus_takes(tmp_path: Path) -> None:
    told = only(chart("everything watched"), "PrometheusRule")
    ours = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "stretto.yml").read_text())
    assert told["spec"] == ours
    assert told["metadata"]["labels"]["release"] == "prometheus"
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(told["spec"]))
    subprocess.run([installed("promtool"), "check", "rules", str(path)], check=True, timeout=60)


def test_dashboards_are_those_of_deploy_grafana() -> None:
    objects = chart("everything watched")
    told = {
        name: json.loads(text)
        for found in objects
        if found["kind"] == "ConfigMap"
        for name, text in found["data"].items()
    }
    ours = {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy" / "grafana" / "dashboards").iterdir()}
    assert told == ours
    for found in objects:
        if found["kind"] == "ConfigMap":
            assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
            assert sum(len(text) for text in found["data"].values()) < 1 << 20


def test_prometheus_finds_the_controllers_with_a_viewers_token() -> None:
    objects = chart("everything watched")
    monitor, service = only(objects, "ServiceMonitor")["spec"], only(objects, "Service", "stretto-controller")
    labels = service["metadata"]["labels"]
    assert all(labels[key] == value for key, value in monitor["selector"]["matchLabels"].items())
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["scheme"] == "https"
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["key"] in only(objects, "Secret", credentials["name"])["data"]


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_images_are_built_in_stages_pinned_and_run_as_nobody(path: Path) -> None:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    stages = [line for line in lines if line.startswith("FROM")]
    assert len(stages) == 2
    (python,) = [line for line in lines if line.startswith("ARG PYTHON=")]
    assert re.fullmatch(r"ARG PYTHON=python:\d+\.\d+\.\d+-slim-\w+", python)
    assert all(line.split()[1] == "${PYTHON}" for line in stages)
    (user,) = [line for line in lines if line.startswith("USER")]
    # A number: Kubernetes cannot know that a name is not root's.
    assert user == "USER 65532:65532"
    assert lines.index(user) > lines.index(stages[1])
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
        if "pip install" in line:
            assert "constraints.txt" in line
