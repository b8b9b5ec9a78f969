"""kubectl as a user would type it, in a namespace of the test's own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from manifests.rendering import program

Json = dict[str, Any]

PATIENCE_S = 120.0
_LOOK_INTERVAL_S = 0.2


class KubectlError(Exception):
    """kubectl said no; the message is what it printed."""


class Kubectl:
    """Of one kubeconfig and one namespace ("": each object's own). story: what to show when a wait was in vain."""

    def __init__(self, kubeconfig: Path, namespace: str, story: Callable[[], str] = lambda: "") -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace
        self._story = story

    def __call__(self, *arguments: str, given: str | None = None, limit_s: float = PATIENCE_S) -> str:
        """What it prints. given: on its standard input. Raises KubectlError."""
        scope = ["-n", self.namespace] if self.namespace else []
        command = [program("kubectl"), "--kubeconfig", str(self.kubeconfig), *scope, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=limit_s)
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Json, dry_run: bool = False) -> str:
        """Server-side, as JSON."""
        options = ["--dry-run=server"] if dry_run else []
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        return self("apply", "--server-side", "--force-conflicts", *options, "-f", "-", given=json.dumps(listed))

    def get(self, *what: str) -> Json:
        found: Json = json.loads(self("get", *what, "-o", "json"))
        return found

    def items(self, *what: str) -> list[Json]:
        listed: list[Json] = self.get(*what)["items"]
        return listed

    def pods(self, selector: str = "") -> list[Json]:
        """By name; those that are being deleted, too."""
        found = self.items("pods", *(["-l", selector] if selector else []))
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    def job(self, name: str) -> Json:
        return self.get("etj", name)

    def patch(self, what: Sequence[str], change: Json) -> None:
        self("patch", *what, "--type=merge", "-p", json.dumps(change))

    def until(self, condition: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
        """Poll until it holds."""
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{what}\n{self._story()}"
            time.sleep(_LOOK_INTERVAL_S)


def condition(found: Json, kind: str) -> Json:
    """A condition of an object's status; {} where it has none of this type."""
    for each in found.get("status", {}).get("conditions", []):
        if each["type"] == kind:
            told: Json = each
            return told
    return {}


def holds(found: Json, kind: str) -> bool:
    return condition(found, kind).get("status") == "True"
