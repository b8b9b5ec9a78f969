"""A namespace of its own on the API server that KUBECONFIG names, with controller, operator and local kubelet."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from harness.controller import STRETTO, ControllerProcess
from harness.kube_site import Site
from harness.kubectl import Kubectl, KubectlError
from harness.operator import install_rights, log_in
from local_kubelet.cluster import Proxy
from local_kubelet.local import LocalKubelet
from manifests.rendering import CRD, program


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        pytest.skip("needs an API server: set KUBECONFIG (one without nodes; the tests bring their own)")
    return Path(path)


@pytest.fixture(scope="session")
def proxy(kubeconfig: Path) -> Iterator[Proxy]:
    with Proxy(program("kubectl"), str(kubeconfig)) as serving:
        yield serving


@pytest.fixture(scope="session")
def definition(kubeconfig: Path) -> None:
    """The custom resource is known."""
    kubectl = Kubectl(kubeconfig, "default")
    kubectl.apply(yaml.safe_load(CRD.read_text()))
    kubectl("wait", "--for=condition=Established", "crd/elastictrainingjobs.stretto.dev", "--timeout=60s")


@pytest.fixture
def site(tmp_path: Path, kubeconfig: Path, proxy: Proxy, definition: None) -> Iterator[Site]:
    namespace = f"stretto-{secrets.token_hex(4)}"
    kubectl = Kubectl(kubeconfig, namespace)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    with ExitStack() as stack:
        stack.callback(kubectl, "delete", "namespace", namespace, "--wait=false", "--ignore-not-found")
        controllers = _service_account_comes(kubectl)
        for name in install_rights(kubectl):
            stack.callback(kubectl, "delete", name, "--ignore-not-found")
        log_in(kubectl, "stretto-operator", tmp_path / "operator.kubeconfig")
        environment = _credentials(tmp_path)
        tokens = str(tmp_path / "tokens")
        (tmp_path / "controller").mkdir()
        controller = stack.enter_context(ControllerProcess(tmp_path / "controller", STRETTO_SECURITY_TOKENS=tokens))
        environment["STRETTO_ENDPOINT"] = controller.grpc
        training = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        kubelet = stack.enter_context(LocalKubelet(proxy.url, namespace, tmp_path / "kubelet", training))
        made = Site(tmp_path, kubectl, kubelet, controller, environment, controllers=controllers)
        made.kubectl = Kubectl(kubeconfig, namespace, made.story)
        yield made
        for operator in made.operators:
            if operator.alive():
                operator.kill()
        # Before the kubelet ends, or whoever owns its pods makes them again.
        kubectl("delete", "namespace", namespace, "--wait=false", "--ignore-not-found")


def _service_account_comes(kubectl: Kubectl) -> bool:
    """Whether a kube-controller-manager runs; where none does, the account that pods need is made here."""
    try:
        kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=20s")
    except KubectlError:
        kubectl("create", "serviceaccount", "default")
        return False
    return True


def _credentials(directory: Path) -> dict[str, str]:
    """The controller's tokens file, and the operator's side of it."""
    lines, made = [], {}
    for role in ("admin", "issuer"):
        done = subprocess.run([STRETTO, "token", role], capture_output=True, text=True, check=True, timeout=60)
        lines.append(done.stderr)
        made[role] = done.stdout.strip()
    (directory / "tokens").write_text("".join(lines))
    (directory / "issuer-key").write_text(made["issuer"])
    return {"STRETTO_TOKEN": made["admin"], "STRETTO_OPERATOR_ISSUER_KEY_FILE": str(directory / "issuer-key")}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's images, unpacked once for all workers."""
    path: Path = tmp_path_factory.mktemp("images") / "images.npz"
    command = [sys.executable, "-m", "stretto.demo.train", "--prepare-images", "--images", str(path)]
    subprocess.run(command, check=True, timeout=120)
    return path
