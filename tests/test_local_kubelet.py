"""What the tests' own kubelet decides: placement, environment, status; and that its processes end as in a container."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from local_kubelet.environment import Unresolved, command_line, environment, replaced
from local_kubelet.images import pull_failure
from local_kubelet.processes import ContainerProcess
from local_kubelet.scheduling import amount, place
from local_kubelet.statuses import ContainerState, phase, status


def node(name: str, taints: tuple[str, ...] = (), **capacity: str) -> Any:
    spec = {"taints": [{"key": key, "effect": "NoExecute"} for key in taints]}
    allocatable = {"cpu": "4", "memory": "8Gi", "pods": "2", **capacity}
    return {"metadata": {"name": name, "labels": {"disk": name}}, "spec": spec, "status": {"allocatable": allocatable}}


def pod(name: str = "p", on: str = "", phase: str = "Running", **spec: Any) -> Any:
    container = {"name": "c", "image": "i", "resources": {"requests": spec.pop("requests", {})}}
    return {
        "metadata": {"name": name, "namespace": "ns", "uid": f"uid-{name}", "labels": {"app": "x"}},
        "spec": {"containers": [container], **({"nodeName": on} if on else {}), **spec},
        "status": {"phase": phase},
    }


def test_places_a_pod_where_the_fewest_are() -> None:
    assert place(pod(), [node("a"), node("b")], [pod("q", on="a")]).node == "b"


def test_says_of_every_node_why_it_does_not_take_a_pod() -> None:
    nodes = [node("a", cpu="1"), node("b", taints=("broken",)), node("c", pods="1")]
    placement = place(pod(requests={"cpu": "2"}), nodes, [pod("q", on="c")])
    assert placement.node is None
    assert placement.reason == (
        "0/3 nodes are available: 1 Insufficient cpu, 1 Too many pods, 1 node(s) had untolerated taint {broken: }."
    )


def test_a_pod_that_has_ended_takes_no_place() -> None:
    assert place(pod(), [node("a", pods="1")], [pod("q", on="a", phase="Succeeded")]).node == "a"


def test_tolerations_and_selectors_are_kept() -> None:
    tolerant = pod(tolerations=[{"key": "broken", "operator": "Exists"}], nodeSelector={"disk": "b"})
    assert place(tolerant, [node("a"), node("b", taints=("broken",))], []).node == "b"


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("2Gi", 2 * 2**30), (3, 3.0), ("1.5", 1.5)])
def test_quantities_are_read_as_kubernetes_writes_them(text: str | int, value: float) -> None:
    assert amount(text) == value


def lookup(kind: str, name: str) -> dict[str, str] | None:
    return {"Secret/s": {"token": "t"}, "ConfigMap/m": {"a": "1"}}.get(f"{kind}/{name}")


def test_variables_come_from_secrets_maps_fields_and_each_other() -> None:
    container = {
        "name": "c",
        "envFrom": [{"configMapRef": {"name": "m"}, "prefix": "M_"}],
        "env": [
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "BOTH", "value": "$(NODE)-$(TOKEN)-$$(NODE)-$(UNKNOWN)"},
            {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "x", "optional": True}}},
        ],
    }
    found = environment(container, pod(), lookup)
    assert found == {"M_a": "1", "TOKEN": "t", "NODE": "p", "APP": "x", "BOTH": "p-t-$(NODE)-$(UNKNOWN)"}


def test_a_secret_that_is_not_there_is_named() -> None:
    container = {"name": "c", "env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "x"}}}]}
    with pytest.raises(Unresolved, match='secret "absent" not found'):
        environment(container, pod(), lookup)


def test_a_container_without_a_command_is_refused_since_nobody_can_ask_its_image() -> None:
    with pytest.raises(Unresolved, match="gives no command"):
        command_line({"name": "c", "args": ["x"]}, {})


def test_mounts_stand_for_folders_as_whole_paths_only() -> None:
    words = ["--a=/data/x", "/data", "/database", "x/data/y"]
    assert replaced(words, {"/data": "/tmp/v"}) == ["--a=/tmp/v/x", "/tmp/v", "/database", "x/data/y"]


def test_an_image_whose_path_says_missing_cannot_be_pulled() -> None:
    assert pull_failure("registry.example/missing/trainer:1") is not None
    assert pull_failure("registry.example/permissions/trainer:1") is None


@pytest.mark.parametrize(
    ("codes", "restarts", "told"),
    [((0, 0), False, "Succeeded"), ((0, 1), False, "Failed"), ((0, None), False, "Running"), ((1,), True, "Running")],
)
def test_a_pod_ends_when_all_containers_have(codes: tuple[int | None, ...], restarts: bool, told: str) -> None:
    states = [ContainerState("c", "i", started_at="t", exit_code=code) for code in codes]
    assert phase(states, restarts=restarts) == told


def test_a_waiting_container_says_why_in_the_pods_status() -> None:
    states = [ContainerState("c", "i", waiting="ImagePullBackOff", message="not found")]
    told = status(states, node_ip="n", pod_ip="p", started_at="s", now="t", restarts=False)
    assert told["phase"] == "Pending"
    assert told["containerStatuses"][0]["state"] == {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    assert {each["type"]: each["status"] for each in told["conditions"]}["Ready"] == "False"


async def test_what_a_container_leaves_behind_is_killed_with_it(tmp_path: Path) -> None:
    """Also in a session of its own, which the group's kill would miss."""
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    process = ContainerProcess("uid/c", [sys.executable, "-c", script], dict(os.environ), tmp_path, tmp_path / "log")
    assert await asyncio.wait_for(process.ended(), 60) == 0
    orphan = int((tmp_path / "log").read_text())
    deadline_s = time.monotonic() + 60
    while Path(f"/proc/{orphan}").exists() and "Z" not in Path(f"/proc/{orphan}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


async def test_a_signal_is_told_as_kubernetes_tells_it(tmp_path: Path) -> None:
    process = ContainerProcess("uid/d", ["sleep", "600"], dict(os.environ), tmp_path, tmp_path / "log")
    process.terminate()
    assert await asyncio.wait_for(process.ended(), 60) == 143
