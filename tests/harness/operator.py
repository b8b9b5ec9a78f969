"""A real `stretto-operator` process that logs in as the service account of k8s/rbac, with its rights and no others."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from manifests.rendering import RBAC, Json, documents

from harness.controller import STRETTO
from harness.kubectl import Kubectl

OPERATOR = str(Path(STRETTO).with_name("stretto-operator"))
_STOP_LIMIT_S = 30.0


def install_rights(kubectl: Kubectl) -> list[str]:
    """The service account with k8s/rbac's rights, in kubectl's namespace. Returns what is to be deleted at the end."""
    namespace = kubectl.namespace
    cluster_wide = []
    for path in sorted(RBAC.glob("*.yaml")):
        for found in documents(path.read_text()):
            if found["kind"] in ("Kustomization",):
                continue
            if found["kind"].startswith("ClusterRole"):
                found["metadata"]["name"] += f"-{namespace}"
                cluster_wide.append(f"{found['kind'].lower()}/{found['metadata']['name']}")
            else:
                found["metadata"]["namespace"] = namespace
            if found.get("roleRef", {}).get("kind") == "ClusterRole":
                found["roleRef"]["name"] += f"-{namespace}"
            for subject in found.get("subjects", []):
                subject["namespace"] = namespace
            kubectl.apply(found)
    return cluster_wide


def log_in(kubectl: Kubectl, account: str, path: Path) -> Path:
    """A kubeconfig of a service account: the same server, that account's token."""
    admin: Json = yaml.safe_load(kubectl("config", "view", "--raw", "--minify", "--flatten"))
    token = kubectl("create", "token", account, "--duration=2h").strip()
    context = admin["contexts"][0]["context"]
    admin["users"] = [{"name": context["user"], "user": {"token": token}}]
    path.write_text(yaml.safe_dump(admin))
    path.chmod(0o600)
    return path


class OperatorProcess:
    """Starts, kills and starts again; serves its namespace only."""

    def __init__(
        self,
        directory: Path,
        kubeconfig: Path,
        namespace: str,
        environment: Mapping[str, str],
        options: Sequence[str] = (),
    ) -> None:
        """environment: how it reaches the controller."""
        self.log_path = directory / "operator.log"
        self._command = [
            *(OPERATOR, "--namespace", namespace, "--lease-namespace", namespace),
            *("--http-host", "127.0.0.1", "--http-port", "0", "--figures-interval-s", "1", *options),
        ]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STRETTO_")}
        self._environment = {**clean, "KUBECONFIG": str(kubeconfig), **environment}
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> OperatorProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert self._process is None, "the operator runs already"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None, "the operator was never started"
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None, "the operator was never started"
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(_STOP_LIMIT_S)
        self._process = None
        return code


def training_job(name: str, command: list[str], **spec: Any) -> Json:
    """An ElasticTrainingJob whose pods run this command; spec: over the defaults."""
    container = {
        "name": "trainer",
        "image": "stretto-worker-demo:0.1.0",
        "command": command,
        "resources": {"requests": {"cpu": "1"}},
    }
    template = {"spec": {"terminationGracePeriodSeconds": 20, "containers": [container]}}
    return {
        "apiVersion": "stretto.dev/v1alpha1",
        "kind": "ElasticTrainingJob",
        "metadata": {"name": name},
        "spec": {"nodes": 2, "minNodes": 1, "maxNodes": 8, "template": template, **spec},
    }
