"""What may go wrong in a cluster: operators die, pods cannot start, machines are called back, people write nonsense."""

from __future__ import annotations

import json
import random
import sys
import time
from functools import partial

import pytest
from harness.kube_site import Site
from harness.kubectl import Json, KubectlError, condition, holds
from harness.operator import OperatorProcess, training_job

pytestmark = [pytest.mark.e2e, pytest.mark.kube, pytest.mark.timeout(400)]

# A pod that does nothing, and ends when it is told to.
IDLE = [sys.executable, "-c", "import signal; signal.sigwait({signal.SIGTERM})"]
SELECTOR = "stretto.dev/job-name={}"


def names(site: Site, job: str) -> list[str]:
    """Of the job's pods that are not on their way out."""
    found = site.kubectl.pods(SELECTOR.format(job))
    return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]


def running(site: Site, job: str) -> list[str]:
    found = site.kubectl.pods(SELECTOR.format(job))
    return [pod["metadata"]["name"] for pod in found if pod["status"]["phase"] == "Running"]


def wanted(job: str, count: int) -> list[str]:
    return [f"{job}-{index}" for index in range(count)]


def test_an_operator_that_is_killed_at_any_moment_ends_with_the_same_pods(site: Site) -> None:
    for number in range(3):
        site.kubelet.add_node(f"node-{number}")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    operator = site.operator("--no-leader-election")
    operator.start()
    site.kubectl.apply(*(training_job(f"job-{n}", IDLE, nodes=2) for n in range(3)))
    for _ in range(8):
        # From before its first request to after its last one.
        _wait_for_lines(operator, rng.randrange(8))
        operator.kill()
        job = f"job-{rng.randrange(3)}"
        site.kubectl("scale", f"etj/{job}", f"--replicas={rng.randint(1, 5)}")
        operator.start()
    for n in range(3):
        site.kubectl("scale", f"etj/job-{n}", f"--replicas={n + 2}")
    for n in range(3):
        job = f"job-{n}"
        site.kubectl.until(partial(_runs_just, site, job, n + 2), f"{job} has other pods")
        owners = {
            owner["name"]
            for pod in site.kubectl.pods(SELECTOR.format(job))
            for owner in pod["metadata"]["ownerReferences"]
        }
        assert owners == {job}


def _runs_just(site: Site, job: str, count: int) -> bool:
    return running(site, job) == names(site, job) == wanted(job, count)


def _wait_for_lines(operator: OperatorProcess, count: int) -> None:
    """Until it has logged so many things that it did, or has nothing more to do."""
    there = operator.log.count("\n")
    deadline_s = time.monotonic() + 20
    while operator.log.count("\n") < there + count and time.monotonic() < deadline_s:
        time.sleep(0.01)


def test_of_two_operators_one_works_and_the_other_takes_over(site: Site) -> None:
    site.kubelet.add_node("node")
    first, second = site.operator(), site.operator()
    first.start()
    site.kubectl.apply(training_job("early", IDLE))
    site.kubectl.until(lambda: names(site, "early") == wanted("early", 2), "the first operator makes no pods")
    second.start()
    first.kill()
    site.kubectl.apply(training_job("late", IDLE))
    site.kubectl.until(lambda: names(site, "late") == wanted("late", 2), "the second operator does not take over")
    first.start()
    site.kubectl("scale", "etj/late", "--replicas=4")
    site.kubectl.until(lambda: names(site, "late") == wanted("late", 4), "two operators are none")
    assert first.alive()
    assert second.alive()


def test_a_namespace_goes_with_all_that_is_in_it(site: Site) -> None:
    if not site.controllers:
        pytest.skip("no kube-controller-manager runs here, so nobody deletes what is in a namespace")
    site.kubelet.add_node("node")
    operator = site.operator()
    operator.start()
    site.kubectl.apply(training_job("doomed", IDLE))
    site.kubectl.until(lambda: running(site, "doomed"), "no pod runs")
    # The operator is away: nothing of it may be needed.
    operator.kill()
    site.kubectl("delete", "namespace", site.kubectl.namespace, "--wait=false")
    site.kubectl("wait", "--for=delete", f"namespace/{site.kubectl.namespace}", "--timeout=110s")


def test_pods_go_with_their_job(site: Site) -> None:
    if not site.controllers:
        pytest.skip("no kube-controller-manager runs here, so nobody collects garbage")
    site.kubelet.add_node("node")
    with site.operator():
        site.kubectl.apply(training_job("short", IDLE))
        site.kubectl.until(lambda: running(site, "short"), "no pod runs")
        site.kubectl("delete", "etj/short")
        site.kubectl.until(lambda: not site.kubectl.pods(), "pods outlive their job")


def test_a_pod_whose_image_is_missing_is_named_and_holds_up_nobody(site: Site) -> None:
    """The image is mended in the template; what runs stays as it is."""
    site.kubelet.add_node("node")
    with site.operator():
        told = training_job("pulled", IDLE, nodes=1)
        site.kubectl.apply(told)
        site.kubectl.until(lambda: running(site, "pulled") == ["pulled-0"], "no pod runs")
        told["spec"]["template"]["spec"]["containers"][0]["image"] = "registry.example/missing/trainer:1"
        told["spec"]["nodes"] = 3
        site.kubectl.apply(told)
        site.kubectl.until(lambda: names(site, "pulled") == wanted("pulled", 3), "the other pods are not made")
        site.kubectl.until(lambda: _degraded(site, "pulled"), "nobody says that the image is missing")
        message = _degraded(site, "pulled")
        assert "pulled-1" in message
        assert "Image" in condition(site.kubectl.job("pulled"), "Degraded")["reason"] + message
        assert running(site, "pulled") == ["pulled-0"]


def _degraded(site: Site, job: str) -> str:
    found = condition(site.kubectl.job(job), "Degraded")
    return str(found["message"]) if found.get("status") == "True" else ""


def test_a_pod_that_no_machine_takes_is_named_with_the_schedulers_reason(site: Site) -> None:
    site.kubelet.add_node("small", pods="1")
    with site.operator():
        site.kubectl.apply(training_job("tight", IDLE, nodes=2))
        site.kubectl.until(lambda: "Too many pods" in _degraded(site, "tight"), "nobody says that a pod waits")
        assert running(site, "tight") == ["tight-0"]
        site.kubelet.add_node("another", pods="1")
        site.kubectl.until(lambda: running(site, "tight") == wanted("tight", 2), "the pod stays unscheduled")
        site.kubectl.until(lambda: not _degraded(site, "tight"), "the job stays degraded")


def test_preempted_and_recalled_pods_are_replaced_and_count_as_nobodys_fault(site: Site) -> None:
    for number in range(2):
        site.kubelet.add_node(f"node-{number}", pods="2")
    with site.operator():
        site.kubectl.apply(training_job("spot", IDLE, nodes=2, backoffLimit=0))
        site.kubectl.until(lambda: running(site, "spot") == wanted("spot", 2), "no pods run")
        former = _uids(site, "spot")
        site.kubelet.preempt("spot-0")
        site.kubectl.until(lambda: _all_new(site, "spot", {former["spot-0"]}), "the preempted pod is not replaced")
        former = _uids(site, "spot")
        node = site.kubelet.node_of("spot-1")
        gone = set(site.kubelet.shut_down_node(node))
        site.kubectl.until(
            lambda: _all_new(site, "spot", {former[name] for name in gone}),
            "pods of a recalled machine are not replaced",
        )
        assert not holds(site.kubectl.job("spot"), "Failed")


def _uids(site: Site, job: str) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in site.kubectl.pods(SELECTOR.format(job))}


def _all_new(site: Site, job: str, former: set[str]) -> bool:
    return running(site, job) == wanted(job, 2) and not former & set(_uids(site, job).values())


def test_a_pod_that_always_fails_ends_the_job_and_the_reason_is_told(site: Site) -> None:
    site.kubelet.add_node("node")
    with site.operator():
        site.kubectl.apply(training_job("broken", [sys.executable, "-c", "exit(3)"], nodes=1, backoffLimit=1))
        site.kubectl("wait", "etj/broken", "--for=condition=Failed", "--timeout=110s")
        found = condition(site.kubectl.job("broken"), "Failed")
        assert "broken-0" in found["message"]
        assert "3" in found["message"]


def test_a_pod_that_runs_out_of_memory_is_replaced_and_the_reason_is_told(site: Site) -> None:
    site.kubelet.add_node("node")
    with site.operator():
        site.kubectl.apply(training_job("hungry", IDLE, nodes=1))
        site.kubectl.until(lambda: running(site, "hungry"), "no pod runs")
        former = _uids(site, "hungry")["hungry-0"]
        site.kubelet.kill_pod("hungry-0", "OOMKilled")
        site.kubectl.until(
            lambda: running(site, "hungry") and _uids(site, "hungry")["hungry-0"] != former, "the pod is not replaced"
        )
        assert "OOMKilled" in json.dumps(site.kubectl.job("hungry")["status"])


def test_what_only_pods_show_is_told_on_the_job(site: Site) -> None:
    """The API server takes the object; its pods it does not."""
    site.kubelet.add_node("node")
    told = training_job("twisted", IDLE, nodes=1)
    told["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] = "Perhaps"
    with site.operator():
        site.kubectl.apply(told)
        site.kubectl.until(
            lambda: "imagePullPolicy" in json.dumps(site.kubectl.job("twisted").get("status", {})), "nobody says why"
        )


def test_an_autoscaler_sees_and_sets_the_size_through_the_scale_subresource(site: Site) -> None:
    site.kubelet.add_node("node")
    path = f"/apis/stretto.dev/v1alpha1/namespaces/{site.kubectl.namespace}/elastictrainingjobs/sized/scale"
    with site.operator():
        site.kubectl.apply(training_job("sized", IDLE, nodes=2))
        site.kubectl.until(lambda: running(site, "sized") == wanted("sized", 2), "no pods run")

        def scale() -> Json:
            found: Json = json.loads(site.kubectl("get", "--raw", path))
            return found

        site.kubectl.until(lambda: scale()["status"]["replicas"] == 2, "the scale subresource does not see the pods")
        assert len(site.kubectl.pods(scale()["status"]["selector"])) == 2
        site.kubectl("replace", "--raw", path, "-f", "-", given=json.dumps({**scale(), "spec": {"replicas": 4}}))
        site.kubectl.until(lambda: running(site, "sized") == wanted("sized", 4), "the job does not grow")
        with pytest.raises(KubectlError, match="at most maxNodes, 8"):
            site.kubectl("scale", "etj/sized", "--replicas=9")


def test_an_idle_cluster_causes_no_writes_but_the_leaders_lease(site: Site) -> None:
    site.kubelet.add_node("node")
    with site.operator():
        site.kubectl.apply(training_job("quiet", IDLE, nodes=3))
        site.kubectl.until(lambda: site.kubectl.job("quiet").get("status", {}).get("readyNodes") == 3, "no pods run")
        # What is written after that has been written by now: the lease is renewed each few seconds.
        _wait_for_renewals(site, 2)
        before = _versions(site)
        _wait_for_renewals(site, 4)
        assert _versions(site) == before


def _versions(site: Site) -> dict[str, str]:
    """The version of everything that an operator could write."""
    found = site.kubectl.items("etj,pods,secrets,poddisruptionbudgets,events")
    return {f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["resourceVersion"] for each in found}


def _wait_for_renewals(site: Site, count: int) -> None:
    seen = {_lease(site)}

    def renewed() -> bool:
        seen.add(_lease(site))
        return len(seen) > count

    site.kubectl.until(renewed, "the lease is not renewed")


def _lease(site: Site) -> str:
    return str(site.kubectl.get("lease", "stretto-operator")["metadata"]["resourceVersion"])
