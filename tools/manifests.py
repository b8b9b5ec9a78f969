"""Writes the kustomize bases from the Helm chart: manifests.py FOLDER. `make manifests` does; a test sees stale ones.

One source for both: what is set in the chart's templates holds for those who use kustomize, too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "deploy" / "helm" / "stretto"
HELM = Path(sys.executable).with_name("helm")
NAMESPACE = "stretto-system"
_SECRETS = {
    "security.certificateSecret": "stretto-certificate",
    "security.tokensSecret": "stretto-tokens",
    "security.clientSecret": "stretto-client",
}
_ETCD = {
    "controller.store": "etcd",
    "controller.replicas": "3",
    "controller.etcd.endpoints": r"etcd-0.etcd:2379\,etcd-1.etcd:2379\,etcd-2.etcd:2379",
}
# Values by base; its Secrets, where it needs them, are for the user to make.
BASES: dict[str, dict[str, str]] = {
    "default": _SECRETS,
    "etcd": {**_SECRETS, **_ETCD},
    "trusted-network": {"security.insecure": "true", "networkPolicy.enabled": "true"},
}
_HELMS_OWN = ("helm.sh/chart", "app.kubernetes.io/managed-by")


def rendered(values: dict[str, str]) -> list[dict[str, Any]]:
    """The chart's objects with these values, without the resource definition. Raises CalledProcessError."""
    options = [f"--set={name}={value}" for name, value in {**values, "crd.install": "false"}.items()]
    command = [str(HELM), "template", "stretto", str(CHART), "--namespace", NAMESPACE, *options]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [found for found in yaml.safe_load_all(text) if found is not None]


def main(folder: Path) -> None:
    for base, values in BASES.items():
        objects = rendered(values)
        for each in objects:
            for label in _HELMS_OWN:
                each["metadata"].get("labels", {}).pop(label, None)
        text = yaml.safe_dump_all(objects, sort_keys=False, width=140)
        (folder / base).mkdir(parents=True, exist_ok=True)
        (folder / base / "stretto.yaml").write_text(f"# Written by `make manifests` from deploy/helm/stretto.\n{text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
