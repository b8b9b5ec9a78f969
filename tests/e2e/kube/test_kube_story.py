"""The whole life of a job in Kubernetes, as its user sees it: kubectl, and what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.kube_site import Site
from harness.kubectl import Json, holds
from harness.operator import training_job
from stretto.sample_log import used_exactly_once

pytestmark = [pytest.mark.e2e, pytest.mark.kube, pytest.mark.timeout(1500)]

JOB = "mnist"
# stretto.demo.workload's own; what its schedule gives on one worker is trained beside the story.
TARGET_TAU = 2000
ALLOWED_LOSS_OF_ACCURACY = 0.02
END_LIMIT_S = 400.0


class Mnist:
    """The demonstration's training as an ElasticTrainingJob, and what its status says."""

    def __init__(self, site: Site, images: Path) -> None:
        self._site = site
        self._kubectl = site.kubectl
        self._images = images
        self._pace = site.directory / "pace"
        self.result = site.directory / "result.json"
        self.sample_log = site.directory / "samples.jsonl"
        self._reference: subprocess.Popen[bytes] | None = None
        self._tau = 0.0

    def apply(self, **spec: object) -> None:
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "checkpoints"},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }
        command = [
            *("stretto", "run", "--max-restarts=100", "-m", "stretto.demo.train"),
            *("--checkpoint=$(STRETTO_CHECKPOINT)", f"--images={self._images}", f"--pace={self._pace}"),
            *(f"--result={self.result}", f"--sample-log={self.sample_log}"),
        ]
        told = training_job(
            JOB,
            command,
            **{
                "baseBatchSize": 16,
                "batchSize": 16,
                "targetTau": TARGET_TAU,
                "checkpoint": {"pvc": "checkpoints", "path": JOB, "interval": "5s"},
                **spec,
            },
        )
        self._kubectl.apply(claim, told)

    def pace(self, step_s: float) -> None:
        """A step takes at least so long."""
        self._pace.with_suffix(".new").write_text(str(step_s))
        self._pace.with_suffix(".new").replace(self._pace)

    def train_reference(self) -> None:
        """One worker with the same schedule, meanwhile."""
        options = ["--reference", "--images", str(self._images), "--result", str(self._reference_result)]
        command = [sys.executable, "-m", "stretto.demo.train", *options]
        self._reference = subprocess.Popen(command)

    @property
    def _reference_result(self) -> Path:
        return self._site.directory / "reference.json"

    def reference_accuracy(self) -> float:
        assert self._reference is not None
        assert self._reference.wait(END_LIMIT_S) == 0
        return _accuracy(self._reference_result)

    def status(self) -> Json:
        told: Json = self._kubectl.job(JOB).get("status", {})
        return told

    def trains_at(self, scale: float) -> None:
        """Wait until it runs at this scale, and tau has grown since; it never goes back."""

        def running() -> bool:
            status = self.status()
            return status.get("phase") == "Running" and status.get("scale") == scale

        self._kubectl.until(running, f"the job does not run at S = {scale}")
        began = self.tau()
        self._kubectl.until(lambda: self.tau() > began, f"tau stands still at {began}")

    def tau(self) -> float:
        tau = float(self.status().get("tau", 0.0))
        assert tau >= self._tau, f"tau went back from {self._tau} to {tau}"
        self._tau = tau
        return tau

    def pods(self) -> list[str]:
        """The names of those that are not on their way out."""
        found = self._kubectl.pods(f"stretto.dev/job-name={JOB}")
        return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def uid(self, pod: str) -> str:
        for found in self._kubectl.pods():
            if found["metadata"]["name"] == pod:
                return str(found["metadata"]["uid"])
        return ""


def test_a_job_is_applied_scaled_hurt_suspended_resumed_and_finished(site: Site, images: Path) -> None:
    kubectl, kubelet = site.kubectl, site.kubelet
    mnist = Mnist(site, images)
    mnist.pace(1.0)
    for number in range(4):
        kubelet.add_node(f"node-{number}", pods="1")
    with site.operator():
        mnist.apply(nodes=2)
        mnist.trains_at(2)
        shows_its_columns(site)

        kubectl("scale", f"etj/{JOB}", "--replicas=3")
        mnist.trains_at(3)

        # Four machines, five pods: the fifth waits, and holds up nobody.
        kubectl("scale", f"etj/{JOB}", "--replicas=5")
        mnist.trains_at(4)
        assert len(mnist.pods()) == 5
        kubectl("scale", f"etj/{JOB}", "--replicas=2")
        mnist.trains_at(2)
        kubectl.until(lambda: mnist.pods() == [f"{JOB}-0", f"{JOB}-1"], "the pods that are too many stay")

        # A pod is deleted by hand.
        former = mnist.uid(f"{JOB}-1")
        kubectl("delete", "pod", f"{JOB}-1", "--wait=false")
        kubectl.until(lambda: mnist.uid(f"{JOB}-1") not in ("", former), "the deleted pod is not replaced")
        mnist.trains_at(2)

        # A machine is gone.
        former = mnist.uid(f"{JOB}-0")
        assert kubelet.lose_node(kubelet.node_of(f"{JOB}-0")) == [f"{JOB}-0"]
        mnist.trains_at(1)
        if site.controllers:
            kubectl.until(lambda: mnist.uid(f"{JOB}-0") not in ("", former), "the lost pod is not replaced")
            mnist.trains_at(2)

        # Suspended, it keeps its place.
        kubectl.patch([f"etj/{JOB}"], {"spec": {"suspend": True}})
        kubectl("wait", f"etj/{JOB}", "--for=condition=Suspended", "--timeout=120s")
        kubectl.until(lambda: not kubectl.pods(), "pods stay while the job is suspended")
        mnist.train_reference()
        kubectl.patch([f"etj/{JOB}"], {"spec": {"suspend": False}})
        mnist.trains_at(2)

        mnist.pace(0.0)
        kubectl(
            "wait", f"etj/{JOB}", "--for=condition=Succeeded", f"--timeout={END_LIMIT_S:.0f}s", limit_s=END_LIMIT_S + 10
        )
    finished = kubectl.job(JOB)["status"]
    assert finished["phase"] == "Succeeded"
    assert finished["tau"] >= TARGET_TAU
    assert used_exactly_once(mnist.sample_log.read_text().splitlines())
    assert _accuracy(mnist.result) >= mnist.reference_accuracy() - ALLOWED_LOSS_OF_ACCURACY


def shows_its_columns(site: Site) -> None:
    """`kubectl get etj`."""
    header, row = site.kubectl("get", "etj").splitlines()
    assert header.split() == ["NAME", "PHASE", "NODES", "S", "TAU", "GAIN", "AGE"]
    assert row.split()[:4] == [JOB, "Running", "2", "2"]
    scale = json.loads(site.kubectl("get", "--raw", _scale_path(site)))
    assert scale["spec"]["replicas"] == scale["status"]["replicas"] == 2
    assert {pod["metadata"]["name"] for pod in site.kubectl.pods(scale["status"]["selector"])} == {
        f"{JOB}-0",
        f"{JOB}-1",
    }
    assert holds(site.kubectl.job(JOB), "Running")


def _scale_path(site: Site) -> str:
    return f"/apis/stretto.dev/v1alpha1/namespaces/{site.kubectl.namespace}/elastictrainingjobs/{JOB}/scale"


def _accuracy(path: Path) -> float:
    return float(json.loads(path.read_text())["accuracy"])
