"""A real etcd of one node or several on free ports; its nodes can be killed, frozen and started again."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stretto_controller.settings import EtcdSettings

from harness.certificates import Authority
from harness.installed import installed
from harness.network import Network

_START_LIMIT_S = 60.0
# Asks on the node's own host.
_ASK = """
import sys, urllib.request
url, content = sys.argv[1:]
print(urllib.request.urlopen(urllib.request.Request(url, content.encode()), timeout=3).read().decode())
"""


class EtcdCluster:
    """etcd nodes 0..count-1. options: more of etcd's flags. authority: clients speak TLS, with certificates of it.

    network: node i runs on its host etcd{i}, where only other hosts of that network reach it.
    """

    def __init__(
        self,
        directory: Path,
        count: int = 1,
        options: Sequence[str] = (),
        *,
        authority: Authority | None = None,
        network: Network | None = None,
    ) -> None:
        self._directory = directory
        self._options = [*options]
        self._scheme, self._tls = "http", None
        if authority is not None:
            self.issued = issued = authority.issue("IP:127.0.0.1")
            self._options += ["--client-cert-auth", "--trusted-ca-file", str(authority.ca)]
            self._options += ["--cert-file", str(issued.cert), "--key-file", str(issued.key)]
            self._scheme, self._tls = "https", ssl.create_default_context(cafile=str(authority.ca))
            self._tls.load_cert_chain(issued.cert, issued.key)
        self._network = network
        ports = free_ports(2 * count)
        self._client_ports, self._peer_ports = ports[:count], ports[count:]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> EtcdCluster:
        for node in range(len(self._client_ports)):
            self.start(node)
        self.await_healthy()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in list(self._processes):
            self.kill(node)

    @property
    def endpoints(self) -> str:
        return ",".join(self.endpoint(node) for node in range(len(self._client_ports)))

    def endpoint(self, node: int) -> str:
        return f"{self._address(node)}:{self._client_ports[node]}"

    def settings(self, **changes: Any) -> EtcdSettings:
        return EtcdSettings(**{"endpoints": self.endpoints, **changes})

    def start(self, node: int) -> None:
        """Start a node, with what it stored before."""
        client, peer = self._client_ports[node], self._peer_ports[node]
        peers = ",".join(f"n{i}=http://{self._address(i)}:{port}" for i, port in enumerate(self._peer_ports))
        address = self._address(node)
        self._directory.mkdir(parents=True, exist_ok=True)
        log = (self._directory / f"etcd{node}.log").open("ab")
        self._processes[node] = subprocess.Popen(
            [
                *(
                    *self._host(node),
                    installed("etcd"),
                    "--name",
                    f"n{node}",
                    "--data-dir",
                    str(self._directory / f"etcd{node}"),
                ),
                *("--listen-client-urls", f"{self._scheme}://{address}:{client}"),
                *("--advertise-client-urls", f"{self._scheme}://{address}:{client}"),
                *("--listen-peer-urls", f"http://{address}:{peer}"),
                *("--initial-advertise-peer-urls", f"http://{address}:{peer}"),
                *("--initial-cluster", peers, "--log-level", "error", *self._options),
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "ETCD_UNSUPPORTED_ARCH": ""},
        )
        log.close()

    def kill(self, node: int) -> None:
        """kill -9."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()

    def freeze(self, node: int) -> None:
        """SIGSTOP."""
        self._processes[node].send_signal(signal.SIGSTOP)

    def thaw(self, node: int) -> None:
        self._processes[node].send_signal(signal.SIGCONT)

    def await_healthy(self) -> None:
        """Wait until every node that runs answers a linearizable read."""
        deadline_s = time.monotonic() + _START_LIMIT_S
        for node in sorted(self._processes):
            while True:
                try:
                    self.ask("kv/range", {"key": _text("health")}, node=node)
                    break
                except OSError:
                    assert self._processes[node].poll() is None, self.log(node)
                    assert time.monotonic() < deadline_s, f"etcd did not come up:\n{self.log(node)}"
                    time.sleep(0.05)

    def leader(self) -> int:
        """The node that leads etcd itself."""
        deadline_s = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline_s:
            for node in list(self._processes):
                # One that has just been started does not answer yet.
                with contextlib.suppress(OSError):
                    status = self.ask("maintenance/status", {}, node=node)
                    if status.get("leader") == status["header"]["member_id"]:
                        return node
            time.sleep(0.05)
        raise AssertionError("etcd has no leader")

    def put(self, key: str, value: str) -> int:
        """Write a key; returns the revision."""
        answer = self.ask("kv/put", {"key": _text(key), "value": _text(value)})
        return int(answer["header"]["revision"])

    def delete(self, key: str) -> None:
        self.ask("kv/deleterange", {"key": _text(key)})

    def get(self, key: str) -> str | None:
        found = self.ask("kv/range", {"key": _text(key)}).get("kvs")
        return base64.b64decode(found[0].get("value", "")).decode() if found else None

    def compact(self) -> None:
        """Forget every revision but the newest."""
        revision = self.ask("kv/range", {"key": _text("health")})["header"]["revision"]
        self.ask("kv/compaction", {"revision": revision, "physical": True})

    def ask(self, path: str, body: dict[str, Any], *, node: int | None = None) -> Any:
        """etcd's JSON gateway. Raises OSError when it does not answer."""
        node = next(iter(self._processes)) if node is None else node
        url, content = f"{self._scheme}://{self.endpoint(node)}/v3/{path}", json.dumps(body)
        if self._network is None:
            request = urllib.request.Request(url, content.encode())
            with urllib.request.urlopen(request, timeout=10, context=self._tls) as response:
                return json.load(response)
        command = [*self._host(node), sys.executable, "-S", "-c", _ASK, url, content]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode != 0:
            raise OSError(f"etcd{node} did not answer: {asked.stderr[-300:]}")
        return json.loads(asked.stdout)

    def _host(self, node: int) -> list[str]:
        return [] if self._network is None else self._network.command(f"etcd{node}")

    def _address(self, node: int) -> str:
        return "127.0.0.1" if self._network is None else self._network.address(f"etcd{node}")

    def log(self, node: int) -> str:
        return (self._directory / f"etcd{node}.log").read_text(errors="replace")[-4000:]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
