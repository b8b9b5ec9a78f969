"""The local kubelet by itself: `python -m local_kubelet --namespace NAME --nodes 3`. Ends with SIGINT."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

from local_kubelet.cluster import Proxy
from local_kubelet.local import LocalKubelet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--namespace", required=True, help="whose pods run here; no other namespace is looked at")
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes there are")
    parser.add_argument("--capacity", action="append", default=[], metavar="NAME=AMOUNT", help="of each node: pods=1")
    parser.add_argument("--folder", type=Path, help="for logs and volumes; default: a new one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="local-kubelet-"))
    kubectl = shutil.which("kubectl")
    if kubectl is None or "KUBECONFIG" not in os.environ:
        parser.error("needs kubectl, and KUBECONFIG for the API server")
    capacity = dict(pair.split("=", 1) for pair in arguments.capacity)
    with (
        Proxy(kubectl, os.environ["KUBECONFIG"]) as proxy,
        LocalKubelet(proxy.url, arguments.namespace, folder) as kubelet,
    ):
        for number in range(arguments.nodes):
            print(f"node {kubelet.add_node(f'node-{number}', **capacity)}; logs and volumes in {folder}", flush=True)
        ended = threading.Event()
        # No blocked signals: the pods' processes would inherit that.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()


if __name__ == "__main__":
    main()
