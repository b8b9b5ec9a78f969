"""What a test in Kubernetes has: kubectl, a kubelet, a controller, and operators to start."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_kubelet.local import LocalKubelet

from harness.controller import STRETTO, ControllerProcess
from harness.kubectl import Kubectl, KubectlError
from harness.operator import OperatorProcess


@dataclass
class Site:
    """Everything in one namespace. environment: how operators reach the controller."""

    directory: Path
    kubectl: Kubectl
    kubelet: LocalKubelet
    controller: ControllerProcess
    environment: dict[str, str]
    operators: list[OperatorProcess] = field(default_factory=list)
    # Whether anybody else (kube-controller-manager) collects garbage, evicts, and makes service accounts.
    controllers: bool = True

    def operator(self, *options: str) -> OperatorProcess:
        """One more, not started yet."""
        name = f"operator-{len(self.operators)}"
        kubeconfig = self.directory / "operator.kubeconfig"
        made = OperatorProcess(self.directory / name, kubeconfig, self.kubectl.namespace, self.environment, options)
        self.operators.append(made)
        return made

    def jobs(self, *arguments: str) -> Any:
        """What `stretto jobs` says to an admin."""
        command = [STRETTO, "jobs", *arguments, "--json"]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout)

    def story(self) -> str:
        """All that is known, for a failure."""
        told = []
        for what in ("etj", "pods", "events"):
            try:
                told.append(self.kubectl("get", what, "-o", "yaml" if what == "etj" else "wide"))
            except KubectlError as error:
                told.append(str(error))
        told += [f"--- {pod}\n{log[-3000:]}" for pod, log in self.kubelet.logs().items()]
        told += [f"--- {operator.log_path}\n{operator.log[-6000:]}" for operator in self.operators]
        return "\n".join([*told, f"--- controller\n{self.controller.log[-3000:]}"])
