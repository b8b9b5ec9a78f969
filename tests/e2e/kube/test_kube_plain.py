"""Without the operator: the examples for what people already run, as they are but for image, script and size."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from harness.controller import STRETTO
from harness.kube_site import Site
from harness.kubectl import Json
from manifests.rendering import EXAMPLES, documents, only, pod_templates

pytestmark = [pytest.mark.e2e, pytest.mark.kube, pytest.mark.timeout(400)]


class Plain:
    """An example that trains the demonstration's CNN for real."""

    def __init__(self, site: Site, images: Path, example: str, job: str) -> None:
        self._site = site
        self._job = job
        self._pace = site.directory / "pace"
        self.result = site.directory / "result.json"
        self._generation = 0
        self.objects = documents((EXAMPLES / example).read_text())
        self._options = [
            *("-m", "stretto.demo.train", f"--checkpoint={site.directory / 'checkpoints'}", f"--images={images}"),
            *(f"--pace={self._pace}", f"--result={self.result}"),
        ]

    def apply(self, kind: str) -> None:
        """With a token of its own, and this test's controller."""
        if not self._site.controllers:
            pytest.skip(f"no kube-controller-manager runs here, so nobody makes the pods of a {kind}")
        (template,) = pod_templates(only(self.objects, kind))
        (container,) = template["spec"]["containers"]
        words = [*container["command"], *container.get("args", [])]
        assert words[-1] == "train.py"
        container["command"] = [*words[:-1], *self._options]
        container.pop("args", None)
        container["resources"] = {}
        for variable in container["env"]:
            if variable["name"] == "STRETTO_ENDPOINT":
                variable["value"] = self._site.environment["STRETTO_ENDPOINT"]
        # The test's controller is on loopback, without TLS.
        container["env"] = [each for each in container["env"] if each["name"] != "STRETTO_TLS_CA"]
        self._site.kubectl.apply(self._secret(f"{self._job}-stretto"), *self.objects)

    def pace(self, step_s: float) -> None:
        self._pace.write_text(str(step_s))

    def trains_with(self, nodes: int, *, after: int = 0) -> int:
        """Wait until a generation with so many nodes, newer than `after`, makes steps; returns its number."""

        def trains() -> bool:
            for job in self._site.jobs("list"):
                if job["name"] == self._job and "generation" in job and "progress" in job:
                    self._generation = int(job["generation"]["number"])
                    made = int(job["progress"]["generation"])
                    return len(job["generation"]["members"]) == nodes and made == self._generation > after
            return False

        self._site.kubectl.until(trains, f"{self._job} does not train with {nodes} nodes")
        return self._generation

    def _secret(self, name: str) -> Json:
        done = subprocess.run(
            [STRETTO, "token", "job", self._job], capture_output=True, text=True, check=True, timeout=60
        )
        with (self._site.directory / "tokens").open("a") as tokens:
            tokens.write(done.stderr)
        data = {"token": base64.b64encode(done.stdout.strip().encode()).decode(), "ca.crt": ""}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def test_a_stateful_set_of_stock_torchrun_grows_and_loses_a_pod(site: Site, images: Path) -> None:
    for number in range(3):
        site.kubelet.add_node(f"node-{number}")
    plain = Plain(site, images, "statefulset.yaml", "plain")
    only(plain.objects, "StatefulSet")["spec"]["replicas"] = 2
    plain.pace(0.2)
    plain.apply("StatefulSet")
    plain.trains_with(2)
    site.kubectl("scale", "statefulset/plain", "--replicas=3")
    whole = plain.trains_with(3)
    site.kubectl("delete", "pod", "plain-0", "--wait=false")
    plain.trains_with(3, after=whole)


def test_a_plain_job_ends_when_training_does(site: Site, images: Path) -> None:
    site.kubelet.add_node("node")
    plain = Plain(site, images, "job.yaml", "plain-job")
    only(plain.objects, "Job")["spec"]["parallelism"] = 2
    plain.pace(0.0)
    plain.apply("Job")
    site.kubectl("wait", "job/plain-job", "--for=condition=Complete", "--timeout=300s", limit_s=310)
    assert plain.result.exists()
