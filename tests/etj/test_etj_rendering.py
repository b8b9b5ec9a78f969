"""`stretto k8s render`, the pods that it shows, and bad YAML in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from etj.etj_site import manifest
from hypothesis import given
from hypothesis import strategies as st
from stretto.cli import build_app
from stretto_operator.job import read_job
from stretto_operator.pod_template import pod_manifest
from stretto_operator.render import rendered
from stretto_operator.surroundings import Surroundings
from stretto_operator.times import duration_s, from_text, to_text
from typer.testing import CliRunner

_GOLDEN = Path(__file__).parent / "golden"


def test_the_example_is_rendered_as_it_was() -> None:
    found = rendered((_GOLDEN / "job.yaml").read_text(), "stretto-controller:29400")
    if os.environ.get("STRETTO_REWRITE_TRACES"):
        (_GOLDEN / "rendered.yaml").write_text(found)
    assert found == (_GOLDEN / "rendered.yaml").read_text()


def test_the_command_prints_what_would_be_made() -> None:
    result = CliRunner().invoke(build_app(), ["k8s", "render", "-f", str(_GOLDEN / "job.yaml")])
    assert result.exit_code == 0
    kinds = [each["kind"] for each in yaml.safe_load_all(result.stdout)]
    assert kinds == ["PodDisruptionBudget", "Pod", "Pod"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"nodes": 9}, "spec.nodes is 9, spec.minNodes 1 and spec.maxNodes 8"),
        ({"nodes": 0}, "spec.nodes is 0; it must be a whole number of at least 1"),
        ({"reconfigure": "sometimes"}, "allowed are restart and in-process"),
        ({"batchSize": 4}, "without spec.baseBatchSize"),
        ({"checkpoint": {"url": "s3://a", "pvc": "b"}}, "a url or a pvc"),
        ({"checkpoint": {"url": "s3://a", "interval": "soon"}}, "write it as 90s, 5m or 1h30m"),
        ({"autoscale": {"goal": "deadline"}}, "spec.autoscale.deadline"),
        ({"template": {"spec": {"containers": []}}}, "give the container that trains"),
    ],
)
def test_a_bad_job_is_refused_in_words(spec: dict[str, Any], words: str) -> None:
    text = yaml.safe_dump(manifest(**spec))
    result = CliRunner().invoke(build_app(), ["k8s", "render", "-f", "-"], input=text)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("text", ["kind: Pod", "", "a: [", "- 1"])
def test_what_is_no_job_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"YAML|no ElasticTrainingJob"):
        rendered(text, "c:1")


def _pod(spec: dict[str, Any], around: Surroundings | None = None) -> dict[str, Any]:
    job = read_job(manifest(template={"spec": spec}))
    return pod_manifest(job, 3, around or Surroundings("c:29400"))


def test_what_the_template_says_stays() -> None:
    container = {
        "name": "main",
        "image": "worker:1",
        "env": [{"name": "PET_NNODES", "value": "2:2"}],
        "securityContext": {"allowPrivilegeEscalation": True, "capabilities": {"add": ["IPC_LOCK"]}},
    }
    spec = {
        "containers": [container],
        "terminationGracePeriodSeconds": 7,
        "automountServiceAccountToken": True,
        "securityContext": {"runAsNonRoot": False},
        "tolerations": [{"operator": "Exists"}],
    }
    made = _pod(spec)["spec"]
    assert made["terminationGracePeriodSeconds"] == 7
    assert made["automountServiceAccountToken"] is True
    assert made["securityContext"]["runAsNonRoot"] is False
    assert made["tolerations"] == [{"operator": "Exists"}]
    assert made["containers"][0]["securityContext"] == container["securityContext"]
    values = {each["name"]: each.get("value") for each in made["containers"][0]["env"]}
    assert values["PET_NNODES"] == "2:2"
    assert values["STRETTO_NODE"] == "digits-3"
    assert len(values) == len(made["containers"][0]["env"])


def test_the_container_named_trainer_trains() -> None:
    containers = [{"name": "proxy", "image": "a"}, {"name": "trainer", "image": "b"}]
    made = _pod({"containers": containers})["spec"]["containers"]
    assert "env" not in made[0]
    assert made[1]["env"]


def test_tokens_and_authorities_come_from_the_jobs_secret() -> None:
    around = Surroundings("c:29400", issuer_key=bytes(32), ca="-----BEGIN", insecure=False)
    container = _pod({"containers": [{"name": "trainer", "image": "b"}]}, around)["spec"]["containers"][0]
    by_name = {each["name"]: each for each in container["env"]}
    assert by_name["STRETTO_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "digits-stretto", "key": "token"}
    assert by_name["STRETTO_TLS_CA"]["value"] == "/var/run/stretto/ca.crt"
    assert container["volumeMounts"][0]["readOnly"] is True


def test_no_pod_of_a_suspended_job_is_rendered() -> None:
    assert rendered(yaml.safe_dump(manifest(suspend=True)), "c:1").strip() in ("", "--- []")


@given(time_s=st.integers(0, 4_000_000_000))
def test_times_survive_the_api(time_s: int) -> None:
    assert from_text(to_text(time_s)) == time_s


@given(parts=st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["h", "m", "s", "ms"])), min_size=1, max_size=4))
def test_durations_add_up(parts: list[tuple[int, str]]) -> None:
    factors = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert duration_s(text) == pytest.approx(sum(number * factors[unit] for number, unit in parts))
